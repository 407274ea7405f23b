"""The sampling loops: prompts' features -> codes, each loop one jitted call.

A loop may also be asked for a part of its steps, from where another part ended: all parts are the
same compiled program, so that they give the bits of the whole.

Axes: B images, N latent tokens, K bits, S steps, L text length, Dt text width. Text inputs have
rows = 2B: B conditional ones, then B unconditional ones (the empty or a negative prompt). Where two
prompts are blended, rows = 3B: B of each prompt, then the unconditional ones.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int, Integer, Key, Shaped

from instella_jax.kernels import binary_sampling
from instella_jax.kernels.binary_sampling import Implementation, random_uniforms
from instella_jax.models import binary_diffusion
from instella_jax.models.ar_transformer import ArTransformer
from instella_jax.models.binary_diffusion import Scalar, Target
from instella_jax.models.diffusion_transformer import DiffusionTransformer, Modulations
from instella_jax.models.functional import Params
from instella_jax.models.layers import unstack

# Added to the number of a step for the noise on bits that are known; steps have other numbers.
KNOWN = 2**16
# Steps of a chunk, whose modulations are computed at once: for each step alone, their weights would
# be read again. Chunks begin at its multiples, so that parts of a loop compute what the whole does.
CHUNK = 32

# Keys and values of the rows of text, and of each layer with those of the image.
RowsKeysValues = tuple[Float[Array, "layers rows L H Dh"], Float[Array, "layers rows L H Dh"]]
RowsCache = tuple[tuple[Float[Array, "rows H S Dh"], Float[Array, "rows H S Dh"]], ...]


def image_keys(seeds: Integer[Array, " B"]) -> Key[Array, " B"]:
    """Return the images' keys from their seeds; a seed always gives the same key."""
    return jax.vmap(jax.random.key)(seeds)


def _bound(network: nn.Module, params: Params) -> Callable[..., Any]:
    return functools.partial(network.apply, {"params": params})


@functools.partial(jax.jit, static_argnames=("network", "protocol", "target", "kernel"))
def sample_diffusion(
    network: DiffusionTransformer,
    params: Params,
    text: Float[Array, "layers rows L Dt"] | RowsKeysValues,
    text_mask: Shaped[Array, "rows L"],
    keys: Key[Array, " B"],
    *,
    steps: Int[Array, ""] | int = 20,
    guidance: Scalar = 7.5,
    temperature: Scalar = 1.0,
    rho: Scalar = 1.0,
    protocol: int = 1,
    target: Target = "epsilon",
    kernel: Implementation = "xla",
    uniforms: Float[Array, "S B N K"] | None = None,
    bits: Float32[Array, "B N K"] | None = None,
    first: Int[Array, ""] | int = 0,
    last: Int[Array, ""] | int | None = None,
    known: tuple[Float32[Array, "B N K"], Bool[Array, "B N"]] | None = None,
    blend: Scalar | None = None,
) -> Float32[Array, "B N K"]:
    """Sample codes from the diffusion generator ("Diffusion process" in docs/model.md).

    An image depends on the parameters, its prompt, its key and the options alone, not on the
    others of its batch. Only `network`, `protocol`, `target`, `kernel` and shapes recompile.

    Args:
      network: the generator.
      params: its parameters.
      text: features, or keys and values that `network.text_kv` made of them.
      text_mask: non-zero at real tokens.
      keys: random keys, one per image.
      steps: S, at least 1.
      guidance: g, 0 for none; see `binary_diffusion.guided`.
      temperature: of the guided logits; 0 thresholds them.
      rho: exponent of the schedule of times.
      protocol: 1 or 2, see `binary_diffusion.step_probability`.
      target: what the network was trained to predict.
      kernel: what samples the bits, see `kernels.binary_sampling.resolve`.
      uniforms: uniform numbers to use in place of the keys': the first make the initial bits,
        number i ends step i - 1.
      bits: where step `first` starts, noisy as its time asks; None for all noise, see
        `initial_bits`.
      first: the first step to take, from 0.
      last: the step to stop before; None for `steps`.
      known: codes, and which of their tokens stay as they are: these have the noise of each
        step's time, whatever the network thinks of them, and none at the end.
      blend: with 3B rows, 0 for the first prompt to 1 for the second; see `_two_rows`.

    Returns:
      bits of 0 and 1, those at the time where step `last` would start.
    """
    apply = _bound(network, params)
    if not isinstance(text, tuple):
        text = apply(text, method="text_kv")
    # Before the loop: every step would copy slices of the stacked parameters.
    layers = unstack(params["blocks"]) if network.run.unroll else None
    shape = (network.num_tokens, network.bits)
    steps = jnp.asarray(steps, jnp.int32)
    last = steps if last is None else jnp.asarray(last, jnp.int32)

    def step(
        index: Int[Array, ""], z: Float32[Array, "B N K"], modulations: Modulations
    ) -> Float32[Array, "B N K"]:
        t, t_next = (binary_diffusion.time_of_step(i, steps, rho) for i in (index, index + 1))
        rows = jnp.concatenate([z] * (text_mask.shape[0] // z.shape[0]))
        of_step = jax.tree.map(
            lambda x: jax.lax.dynamic_index_in_dim(x, index % CHUNK, axis=-2), modulations
        )
        output = apply(rows, of_step, text, text_mask, layers)
        flip = _two_rows(binary_diffusion.flip_logits(output, rows, target), z, blend)
        settings = (t, t_next, guidance, temperature, index + 1 == steps)
        if uniforms is None:
            z = binary_sampling.diffusion_step(
                flip, z, keys, index + 1, *settings, protocol=protocol, implementation=kernel
            )
            return z if known is None else _keep(known, z, t_next, keys, index + 1)
        # The last step asks for numbers past the end and does not use them.
        given = jax.lax.dynamic_index_in_dim(uniforms, index + 1, keepdims=False)
        conditional, unconditional = flip
        return binary_diffusion.sampling_step(
            conditional, unconditional, z, *settings, given, protocol
        )

    def chunk(number: Int[Array, ""], z: Float32[Array, "B N K"]) -> Float32[Array, "B N K"]:
        begin = number * CHUNK
        indices = jnp.minimum(begin + jnp.arange(CHUNK), steps)
        times = jax.vmap(lambda i: binary_diffusion.time_of_step(i, steps, rho))(indices)
        modulated_step = functools.partial(step, modulations=apply(times, method="modulations"))
        start, stop = jnp.maximum(first, begin), jnp.minimum(last, begin + CHUNK)
        return jax.lax.fori_loop(start, stop, modulated_step, z)

    if bits is None:
        bits = initial_bits(keys, shape) if uniforms is None else _coin(uniforms[0])
    if known is not None:
        start = binary_diffusion.time_of_step(first, steps, rho)
        bits = _keep(known, bits, start, keys, first)
    return jax.lax.fori_loop(first // CHUNK, -(-last // CHUNK), chunk, bits)


def _two_rows(
    logits: Float[Array, "rows N K"] | Float[Array, "rows K"],
    like: Float[Array, "B N K"] | Float[Array, "B K"],
    blend: Scalar | None,
) -> Float[Array, "2 B N K"] | Float[Array, "2 B K"]:
    """Return conditional and unconditional logits out of those of all rows.

    Those of two prompts are blended as (1 - blend) first + blend second: of the bits, a product of
    both distributions.
    """
    if blend is None:
        return logits.reshape(2, *like.shape)
    first, second, unconditional = logits.reshape(3, *like.shape)
    return jnp.stack([(1.0 - blend) * first + blend * second, unconditional])


def _coin(uniforms: Float[Array, "*axes"]) -> Float32[Array, "*axes"]:
    return (uniforms < 0.5).astype(jnp.float32)


@functools.partial(jax.jit, static_argnames="shape")
def initial_bits(keys: Key[Array, " B"], shape: tuple[int, int]) -> Float32[Array, "B N K"]:
    """Return the noise that sampling starts from, for codes of the shape [N, K]."""
    return _coin(random_uniforms(keys, 0, shape))


@jax.jit
def noisy_bits(
    code: Float32[Array, "B N K"], t: Scalar, keys: Key[Array, " B"]
) -> Float32[Array, "B N K"]:
    """Return codes with the noise of time t, from the numbers that make `initial_bits`."""
    times = jnp.broadcast_to(t, code.shape[:1])
    return binary_diffusion.add_noise(code, times, random_uniforms(keys, 0, code.shape[1:]))


def _keep(
    known: tuple[Float32[Array, "B N K"], Bool[Array, "B N"]],
    z: Float32[Array, "B N K"],
    t: Scalar,
    keys: Key[Array, " B"],
    number: Int[Array, ""] | int,
) -> Float32[Array, "B N K"]:
    """Put known tokens, with the noise of time t, in the place of sampled ones."""
    code, keep = known
    uniforms = random_uniforms(keys, KNOWN + number, code.shape[1:])
    noisy = binary_diffusion.add_noise(code, jnp.broadcast_to(t, code.shape[:1]), uniforms)
    return jnp.where(keep[..., None], noisy, z)


def sample_ar(
    network: ArTransformer,
    params: Params,
    text: Float[Array, "layers rows L Dt"] | RowsKeysValues,
    text_mask: Shaped[Array, "rows L"],
    keys: Key[Array, " B"],
    **options: Any,
) -> Float32[Array, "B N K"]:
    """Sample codes from the autoregressive generator, with a cache.

    An image depends on the parameters, its prompt, its key and the options alone, not on the
    others of its batch. Only `network`, `kernel` and shapes recompile.

    Args:
      network: the generator.
      params: its parameters.
      text: features, or keys and values that `network.text_kv` made of them.
      text_mask: non-zero at real tokens.
      keys: random keys, one per image.
      options: see `continue_ar`.

    Returns:
      bits of 0 and 1.
    """
    cache = start_ar(network, params, text)
    code = jnp.zeros((keys.shape[0], network.num_tokens, network.bits), jnp.float32)
    return continue_ar(network, params, cache, text_mask, keys, code, **options)[1]


@functools.partial(jax.jit, static_argnames="network")
def start_ar(
    network: ArTransformer,
    params: Params,
    text: Float[Array, "layers rows L Dt"] | RowsKeysValues,
) -> RowsCache:
    """Return the cache that `continue_ar` begins with."""
    return _bound(network, params)(text, method="start_cache")


@functools.partial(jax.jit, static_argnames=("network", "kernel"), donate_argnames="cache")
def continue_ar(
    network: ArTransformer,
    params: Params,
    cache: RowsCache,
    text_mask: Shaped[Array, "rows L"],
    keys: Key[Array, " B"],
    code: Float32[Array, "B N K"],
    first: Int[Array, ""] | int = 0,
    last: Int[Array, ""] | int | None = None,
    *,
    guidance: Scalar = 9.0,
    temperature: Scalar = 0.5,
    kernel: Implementation = "xla",
    uniforms: Float[Array, "B N K"] | None = None,
    keep: Bool[Array, "B N"] | None = None,
    blend: Scalar | None = None,
) -> tuple[RowsCache, Float32[Array, "B N K"]]:
    """Sample tokens `first` to `last` of codes whose earlier tokens are there.

    Args:
      network: the generator.
      params: its parameters.
      cache: of the tokens before `first`; it is used up.
      text_mask: non-zero at real tokens.
      keys: random keys, one per image.
      code: bits of the tokens before `first`, and of those to keep.
      first: the first token to sample, from 0.
      last: the token to stop before; None for N.
      guidance: g, 0 for none; see `binary_diffusion.guided`.
      temperature: of the guided logits; 0 thresholds them.
      kernel: what samples the bits, see `kernels.binary_sampling.resolve`.
      uniforms: uniform numbers to use in place of the keys'.
      keep: tokens that stay as they are in `code`.
      blend: with 3B rows, 0 for the first prompt to 1 for the second; see `_two_rows`.

    Returns:
      cache, and codes, of the tokens before `last`.
    """
    apply, layers = _bound(network, params), unstack(params["blocks"])

    def step(
        index: Int[Array, ""], carry: tuple[Any, Float32[Array, "B N K"]]
    ) -> tuple[Any, Float32[Array, "B N K"]]:
        cache, code = carry
        # At token 0 any: the network does not look at it.
        previous = jax.lax.dynamic_index_in_dim(code, index - 1, axis=1, keepdims=False)
        rows = jnp.concatenate([previous] * (text_mask.shape[0] // previous.shape[0]))
        logits, cache = apply(rows, index, cache, text_mask, layers, method="step")
        logits = _two_rows(logits, previous, blend)
        if uniforms is None:
            bits = binary_sampling.autoregressive_bits(
                logits, keys, index, guidance, temperature, implementation=kernel
            )
        else:
            given = jax.lax.dynamic_index_in_dim(uniforms, index, axis=1, keepdims=False)
            conditional, unconditional = logits
            bits = binary_diffusion.sample_bits(
                conditional, unconditional, guidance, temperature, given
            )
        if keep is not None:
            kept = jax.lax.dynamic_index_in_dim(keep, index, axis=1)
            own = jax.lax.dynamic_index_in_dim(code, index, axis=1, keepdims=False)
            bits = jnp.where(kept, own, bits)
        return cache, jax.lax.dynamic_update_index_in_dim(code, bits, index, axis=1)

    last = network.num_tokens if last is None else last
    return jax.lax.fori_loop(first, last, step, (cache, code))
