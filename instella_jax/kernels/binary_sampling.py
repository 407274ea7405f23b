"""Bits from logits in one pass over memory: guidance, temperature, sigmoid, process step, sample.

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
from jaxtyping import Array, Bool, Float, Float32, Int, Key, UInt32

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
Index = Int[Array, ""] | int


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


def random_uniforms(
    keys: Key[Array, " B"], index: Index, shape: tuple[int, ...]
) -> Float32[Array, " B *axes"]:
    """Return uniform numbers of the given shape, number `index` of each image's own key."""
    return jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, index), shape))(keys)


def diffusion_step(
    logits: Float[Array, "2 B N K"],
    z: Float[Array, "B N K"],
    keys: Key[Array, " B"],
    index: Index,
    t: Scalar,
    t_next: Scalar,
    guidance: Scalar,
    temperature: Scalar,
    is_last: Bool[Array, ""] | bool,
    *,
    protocol: int = 1,
    implementation: Implementation = "xla",
    block: int | None = None,
    interpret: bool = False,
) -> Float[Array, "B N K"]:
    """Take one step back: `binary_diffusion.sampling_step` with `random_uniforms`.

    With a mesh set (`sharding.use`), the kernels run on each device's own images.

    Args:
      logits: flip logits, conditional and unconditional; bfloat16 or float32.
      z: bits at time t.
      keys: random keys, one per image; threefry for the kernels.
      index: of the uniform numbers, from 0; they depend on key, index and place in the image.
      t: where the step starts.
      t_next: where it ends, below t.
      guidance: see `binary_diffusion.guided`.
      temperature: likewise; at 0 every sample becomes the threshold of the guided logits.
      is_last: whether this is the last step, which samples nothing: its bits are those more
        likely than not.
      protocol: 1 or 2, see `binary_diffusion.step_probability`.
      implementation: as `resolve` says.
      block: elements that a GPU program samples (a power of 2), rows that a TPU program samples (a
        multiple of 8, 16 with bfloat16, or N or more); by default chosen for the shape.
      interpret: run a kernel in Pallas' interpreter, on any platform.

    Returns:
      bits in the type of z.

    Raises:
      UserError: a kernel got keys that are not threefry's.
    """

    rule = functools.partial(_step_rule, protocol=protocol)
    scalars = (t, t_next, guidance, temperature, is_last)
    return _apply(rule, logits, (z,), keys, index, scalars, implementation, block, interpret)


def autoregressive_bits(
    logits: Float[Array, "2 B K"],
    keys: Key[Array, " B"],
    index: Index,
    guidance: Scalar,
    temperature: Scalar,
    *,
    implementation: Implementation = "xla",
    block: int | None = None,
    interpret: bool = False,
) -> Float32[Array, "B K"]:
    """Sample the bits of one token: `binary_diffusion.sample_bits` with `random_uniforms`.

    Args:
      logits: of the bits, conditional and unconditional; bfloat16 or float32.
      keys: random keys, one per image; threefry for the kernels.
      index: number of the token, which is that of its uniform numbers.
      guidance: see `binary_diffusion.guided`.
      temperature: likewise; at 0 every sample becomes the threshold of the guided logits.
      implementation: as `resolve` says.
      block: see `diffusion_step`, with one row per image.
      interpret: run a kernel in Pallas' interpreter, on any platform.

    Returns:
      bits of 0 and 1.

    Raises:
      UserError: a kernel got keys that are not threefry's.
    """

    scalars = (guidance, temperature)
    logits = logits[:, :, None]
    bits = _apply(_bits_rule, logits, (), keys, index, scalars, implementation, block, interpret)
    return bits[:, 0]


def _step_rule(
    conditional: Float[Array, "*axes"],
    unconditional: Float[Array, "*axes"],
    z: Float[Array, "*axes"],
    uniforms: Float32[Array, "*axes"],
    t: Float32[Array, ""],
    t_next: Float32[Array, ""],
    guidance: Float32[Array, ""],
    temperature: Float32[Array, ""],
    is_last: Float32[Array, ""],
    protocol: int,
) -> Float[Array, "*axes"]:
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
    conditional: Float[Array, "*axes"],
    unconditional: Float[Array, "*axes"],
    uniforms: Float32[Array, "*axes"],
    guidance: Float32[Array, ""],
    temperature: Float32[Array, ""],
) -> Float32[Array, "*axes"]:
    return binary_diffusion.sample_bits(conditional, unconditional, guidance, temperature, uniforms)


def _apply(
    rule: Rule,
    logits: Float[Array, "2 B N K"],
    state: tuple[Float[Array, "B N K"], ...],
    keys: Key[Array, " B"],
    index: Index,
    scalars: tuple[Any, ...],
    implementation: Implementation,
    block: int | None,
    interpret: bool,
) -> Float[Array, "B N K"]:
    """Return the bits `rule(*logits, *state, uniforms, *scalars)`."""
    numbers = jnp.stack([jnp.asarray(s, jnp.float32) for s in scalars])
    if implementation == "xla":
        return rule(*logits, *state, random_uniforms(keys, index, logits.shape[2:]), *numbers)
    words = jax.random.key_data(keys)
    if words.shape[1:] != (2,) or words.dtype != jnp.uint32:
        raise UserError(
            f"the Pallas sampling kernels sample with threefry keys, not {keys.dtype}: unset "
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
    words: UInt32[Array, "B 2"],
    index: UInt32[Array, "1"],
    numbers: Float32[Array, " scalars"],
    logits: Float[Array, "2 B N K"],
    *state: Float[Array, "B N K"],
    gpu: bool,
    block: int | None,
    interpret: bool,
) -> Float[Array, "B N K"]:
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


def _view(
    x: Float[Array, "*images N K"], leading: int, gpu: bool, block: int | None
) -> Float[Array, "*images R C"]:
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
    """Sample one block of one image's bits."""
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
    key: tuple[UInt32[Array, ""], UInt32[Array, ""]],
    high: UInt32[Array, "*#axes"],
    low: UInt32[Array, "*#axes"],
) -> tuple[UInt32[Array, "*axes"], UInt32[Array, "*axes"]]:
    """Return two words of Threefry-2x32 (20 rounds) at the counter (high, low).

    Word i of `jax.random.bits` is the exclusive or of the words at (0, i), and `fold_in(key, d)`
    is the words at (0, d).

    Args:
      key: two words.
      high: the counter's first word.
      low: the counter's second word.
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
