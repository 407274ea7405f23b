"""Bits from logits in one pass over memory: guidance, temperature, sigmoid, process step, draw.

Two operations, `diffusion_step` and `autoregressive_bits`, each with three implementations behind
one signature: the XLA reference, a Pallas kernel for TPU and one for GPU (Triton: CUDA and ROCm).
All of them do the arithmetic of `binary_diffusion`, and all make the very uniforms of
`jax.random`, so the bits do not depend on blocks, batch or devices. Between implementations a
probability can differ in its last digit, with the platform's exponential function.

Axes: B images, N tokens, K bits; inside the kernels an image is R rows of C columns.
"""

import functools
import logging
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from instella_jax.errors import UserError
from instella_jax.models import binary_diffusion
from instella_jax.models.binary_diffusion import Scalar
from instella_jax.runtime import sharding

logger = logging.getLogger(__name__)

Implementation = Literal["xla", "pallas_tpu", "pallas_gpu"]
NAMES = ("auto", "xla", "pallas")
PALLAS: dict[str, Implementation] = {
    "tpu": "pallas_tpu",
    "gpu": "pallas_gpu",
    "cuda": "pallas_gpu",
    "rocm": "pallas_gpu",
}

# Elements per program: of a GPU's flat view, and the bound on a TPU's rows times columns.
GPU_BLOCK = 1024
TPU_BLOCK = 256 * 128

ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))

Rule = Callable[..., jax.Array]


@functools.cache
def resolve(name: str, platform: str) -> Implementation:
    """Choose the implementation for a config's word, and log it once.

    Args:
      name: "auto" is the one measured to be faster on the platform, and the reference where
        nothing was measured, which is everywhere so far; "xla" is the reference; "pallas" is the
        platform's kernel.
      platform: as `jax.default_backend()` says: "cpu", "gpu" (or "cuda", "rocm"), "tpu".

    Raises:
      UserError: the name is unknown, or the platform has no kernel.
    """
    if name not in NAMES:
        raise UserError(f"sample.kernel is {name!r}: expected one of {NAMES}")
    if name == "pallas" and platform not in PALLAS:
        raise UserError(
            f"sample.kernel is 'pallas', which runs on TPU and GPU and not on {platform}: "
            "use 'auto' or 'xla'"
        )
    chosen = PALLAS[platform] if name == "pallas" else "xla"
    logger.info("sampling kernel on %s: %s (asked for: %s)", platform, chosen, name)
    return chosen


def draw(keys: jax.Array, index: jax.Array | int, shape: tuple[int, ...]) -> jax.Array:
    """Return uniforms [B, *shape] of draw number `index`, each image's from its own key [B]."""
    return jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, index), shape))(keys)


def diffusion_step(
    logits: jax.Array,
    z: jax.Array,
    keys: jax.Array,
    index: jax.Array | int,
    t: Scalar,
    t_next: Scalar,
    guidance: Scalar,
    temperature: Scalar,
    is_last: jax.Array | bool,
    *,
    protocol: int = 1,
    implementation: Implementation = "xla",
    block: int | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Take one step back: `binary_diffusion.sampling_step` with the uniforms of `draw`.

    With a mesh set (`sharding.use`), the kernels run on each device's own images.

    Args:
      logits: flip logits [2, B, N, K], conditional and unconditional; bfloat16 or float32.
      z: bits at time t [B, N, K].
      keys: [B] random keys, one per image; threefry for the kernels.
      index: number of the draw, from 0; the draw depends on key, index and place in the image.
      t: where the step starts.
      t_next: where it ends, below t.
      guidance: see `binary_diffusion.guided`.
      temperature: likewise; at 0 every draw becomes the threshold of the guided logits.
      is_last: the last step draws nothing: its bits are those more likely than not.
      protocol: 1 or 2, see `binary_diffusion.step_probability`.
      implementation: as `resolve` says.
      block: elements that a GPU program draws (a power of 2), rows that a TPU program draws (a
        multiple of 8, 16 with bfloat16, or N or more); by default chosen for the shape.
      interpret: run a kernel in Pallas' interpreter, on any platform.

    Returns:
      bits [B, N, K] in the type of z.

    Raises:
      UserError: a kernel got keys that are not threefry's.
    """

    rule = functools.partial(_step_rule, protocol=protocol)
    scalars = (t, t_next, guidance, temperature, is_last)
    return _apply(rule, logits, (z,), keys, index, scalars, implementation, block, interpret)


def autoregressive_bits(
    logits: jax.Array,
    keys: jax.Array,
    index: jax.Array | int,
    guidance: Scalar,
    temperature: Scalar,
    *,
    implementation: Implementation = "xla",
    block: int | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Draw the bits of one token: `binary_diffusion.draw_bits` with the uniforms of `draw`.

    Args:
      logits: of the bits [2, B, K], conditional and unconditional; bfloat16 or float32.
      keys: [B] random keys, one per image; threefry for the kernels.
      index: number of the token, which is that of the draw.
      guidance: see `binary_diffusion.guided`.
      temperature: likewise; at 0 every draw becomes the threshold of the guided logits.
      implementation: as `resolve` says.
      block: see `diffusion_step`, with one row per image.
      interpret: run a kernel in Pallas' interpreter, on any platform.

    Returns:
      bits [B, K], float32 of 0 and 1.

    Raises:
      UserError: a kernel got keys that are not threefry's.
    """

    scalars = (guidance, temperature)
    logits = logits[:, :, None]
    bits = _apply(_bits_rule, logits, (), keys, index, scalars, implementation, block, interpret)
    return bits[:, 0]


def _step_rule(
    conditional: jax.Array,
    unconditional: jax.Array,
    z: jax.Array,
    uniforms: jax.Array,
    t: jax.Array,
    t_next: jax.Array,
    guidance: jax.Array,
    temperature: jax.Array,
    is_last: jax.Array,
    protocol: int,
) -> jax.Array:
    return binary_diffusion.sampling_step(
        conditional,
        unconditional,
        z,
        t,
        t_next,
        guidance,
        temperature,
        is_last > 0.5,
        uniforms,
        protocol,
    )


def _bits_rule(
    conditional: jax.Array,
    unconditional: jax.Array,
    uniforms: jax.Array,
    guidance: jax.Array,
    temperature: jax.Array,
) -> jax.Array:
    return binary_diffusion.draw_bits(conditional, unconditional, guidance, temperature, uniforms)


def _apply(
    rule: Rule,
    logits: jax.Array,
    state: tuple[jax.Array, ...],
    keys: jax.Array,
    index: jax.Array | int,
    scalars: tuple[Any, ...],
    implementation: Implementation,
    block: int | None,
    interpret: bool,
) -> jax.Array:
    """Return bits [B, N, K] by `rule(*logits [2, B, N, K], *state, uniforms, *scalars)`."""
    numbers = jnp.stack([jnp.asarray(s, jnp.float32) for s in scalars])
    if implementation == "xla":
        return rule(*logits, *state, draw(keys, index, logits.shape[2:]), *numbers)
    words = jax.random.key_data(keys)
    if words.shape[1:] != (2,) or words.dtype != jnp.uint32:
        raise UserError(
            f"the Pallas sampling kernels draw from threefry keys, not {keys.dtype}: unset "
            "JAX_DEFAULT_PRNG_IMPL, or set sample.kernel to 'xla'"
        )
    call = functools.partial(
        _pallas, rule, gpu=implementation == "pallas_gpu", block=block, interpret=interpret
    )
    operands = (words, jnp.asarray(index, jnp.uint32).reshape(1), numbers, logits, *state)
    mesh: Any = jax.sharding.get_abstract_mesh()
    if mesh.empty or AxisType.Manual in mesh.axis_types:
        return call(*operands)
    # XLA cannot split a kernel: left to itself it would gather the whole batch on each device.
    of_batch, of_logits = (sharding.batch_sharding(mesh, i).spec for i in (0, 1))
    if keys.shape[0] % sharding.batch_parts(mesh) != 0:
        of_batch = of_logits = P()
    specs = (of_batch, P(), P(), of_logits, *(of_batch for _ in state))
    return jax.shard_map(call, in_specs=specs, out_specs=of_batch, check_vma=False)(*operands)


def _pallas(
    rule: Rule,
    words: jax.Array,
    index: jax.Array,
    numbers: jax.Array,
    logits: jax.Array,
    *state: jax.Array,
    gpu: bool,
    block: int | None,
    interpret: bool,
) -> jax.Array:
    """Run the kernel over a grid of (images, blocks of rows)."""
    batch, *shape = logits.shape[1:]
    dtype = state[0].dtype if state else jnp.float32
    logits = _view(logits, 2, gpu, block)
    states = [_view(x, 1, gpu, block) for x in state]
    rows, columns = logits.shape[2:]
    if gpu:
        from jax.experimental.pallas import triton

        of_scalars, block_rows = pl.BlockSpec(), 1
        params: Any = triton.CompilerParams(num_warps=4, num_stages=1)
    else:
        from jax.experimental.pallas import tpu

        of_scalars = pl.BlockSpec(memory_space=tpu.SMEM)
        block_rows = min(rows, block or max(32, TPU_BLOCK // columns // 32 * 32))
        params = tpu.CompilerParams(dimension_semantics=("parallel", "parallel"))

    def half(number: int) -> pl.BlockSpec:
        return pl.BlockSpec(
            (None, None, block_rows, columns), lambda image, i: (number, image, i, 0)
        )

    of_state = pl.BlockSpec((None, block_rows, columns), lambda image, i: (image, i, 0))
    # The halves of the logits are two views of one operand: split outside, they would be copied.
    bits = pl.pallas_call(
        functools.partial(_kernel, rule, len(numbers)),
        out_shape=jax.ShapeDtypeStruct((batch, rows, columns), dtype),
        grid=(batch, pl.cdiv(rows, block_rows)),
        in_specs=[of_scalars] * 3 + [half(0), half(1)] + [of_state] * len(states),
        out_specs=of_state,
        compiler_params=params,
        interpret=interpret,
        name="binary_sampling",
    )(words.reshape(-1), index, numbers, logits, logits, *states)
    return bits.reshape(batch, -1)[:, : shape[0] * shape[1]].reshape(batch, *shape)


def _view(x: jax.Array, leading: int, gpu: bool, block: int | None) -> jax.Array:
    """Return the rows and columns of each image; flat and padded to whole blocks on a GPU.

    Triton loads powers of 2 and masks nothing. A TPU's tiles would have to be moved to be flat.
    """
    if not gpu:
        return x
    x = x.reshape(*x.shape[:leading], -1)
    size = x.shape[-1]
    columns = block or min(GPU_BLOCK, pl.next_power_of_2(size))
    x = jnp.pad(x, [(0, 0)] * leading + [(0, -size % columns)])
    return x.reshape(*x.shape[:leading], -1, columns)


def _kernel(rule: Rule, count: int, words: Any, index: Any, numbers: Any, *refs: Any) -> None:
    """Draw one block of one image's bits."""
    *inputs, out = refs
    image, rows = pl.program_id(0), pl.program_id(1) * out.shape[0]
    key = threefry((words[2 * image], words[2 * image + 1]), jnp.uint32(0), index[0])
    row, column = (jax.lax.broadcasted_iota(jnp.int32, out.shape, axis) for axis in (0, 1))
    place = ((rows + row) * out.shape[1] + column).astype(jnp.uint32)
    high, low = threefry(key, jnp.zeros_like(place), place)
    # As jax.random: 23 random bits below the exponent of 1 are a float in [1, 2).
    one = jax.lax.bitcast_convert_type((high ^ low) >> 9 | jnp.uint32(0x3F800000), jnp.float32)
    scalars = (numbers[i] for i in range(count))
    out[...] = rule(*(ref[...] for ref in inputs), one - 1.0, *scalars).astype(out.dtype)


def threefry(
    key: tuple[jax.Array, jax.Array], high: jax.Array, low: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Return two words of Threefry-2x32 (20 rounds) at the counter (high, low).

    Draw i of `jax.random.bits` is the exclusive or of the words at (0, i), and `fold_in(key, d)`
    is the words at (0, d).

    Args:
      key: two uint32 words.
      high: uint32, any shape.
      low: uint32, the same shape.
    """
    schedule = (*key, key[0] ^ key[1] ^ jnp.uint32(0x1BD11BDA))
    high, low = high + schedule[0], low + schedule[1]
    for group in range(5):
        for bits in ROTATIONS[group % 2]:
            high = high + low
            low = (low << bits | low >> (32 - bits)) ^ high
        high = high + schedule[(group + 1) % 3]
        low = low + schedule[(group + 2) % 3] + jnp.uint32(group + 1)
    return high, low
