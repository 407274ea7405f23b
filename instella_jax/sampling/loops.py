"""The sampling loops: prompts' features -> codes, each loop one jitted call.

Axes: B images, N latent tokens, K bits, S steps, L text length, Dt text width. Text inputs have
rows = 2B: B conditional ones, then B unconditional ones (the empty or a negative prompt).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int, Integer, Key, Shaped

from instella_jax.kernels import binary_sampling
from instella_jax.kernels.binary_sampling import Implementation, random_uniforms
from instella_jax.models import binary_diffusion
from instella_jax.models.ar_transformer import ArTransformer
from instella_jax.models.binary_diffusion import Scalar, Target
from instella_jax.models.diffusion_transformer import DiffusionTransformer
from instella_jax.models.functional import Params

# Keys and values of the 2B rows of text.
RowsKeysValues = tuple[Float[Array, "layers rows L H Dh"], Float[Array, "layers rows L H Dh"]]


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

    Returns:
      bits of 0 and 1.
    """
    apply = _bound(network, params)
    if not isinstance(text, tuple):
        text = apply(text, method="text_kv")
    shape = (network.num_tokens, network.bits)
    steps = jnp.asarray(steps, jnp.int32)

    def step(index: Int[Array, ""], z: Float32[Array, "B N K"]) -> Float32[Array, "B N K"]:
        t, t_next = (binary_diffusion.time_of_step(i, steps, rho) for i in (index, index + 1))
        both = jnp.concatenate([z, z])
        times = jnp.broadcast_to(t, both.shape[:1])
        output = apply(both, times, text, text_mask)
        flip = binary_diffusion.flip_logits(output, both, target).reshape(2, *z.shape)
        settings = (t, t_next, guidance, temperature, index + 1 == steps)
        if uniforms is None:
            return binary_sampling.diffusion_step(
                flip, z, keys, index + 1, *settings, protocol=protocol, implementation=kernel
            )
        # The last step asks for numbers past the end and does not use them.
        given = jax.lax.dynamic_index_in_dim(uniforms, index + 1, keepdims=False)
        conditional, unconditional = flip
        return binary_diffusion.sampling_step(
            conditional, unconditional, z, *settings, given, protocol
        )

    first = random_uniforms(keys, 0, shape) if uniforms is None else uniforms[0]
    return jax.lax.fori_loop(0, steps, step, (first < 0.5).astype(jnp.float32))


@functools.partial(jax.jit, static_argnames=("network", "kernel"))
def sample_ar(
    network: ArTransformer,
    params: Params,
    text: Float[Array, "layers rows L Dt"] | RowsKeysValues,
    text_mask: Shaped[Array, "rows L"],
    keys: Key[Array, " B"],
    *,
    guidance: Scalar = 9.0,
    temperature: Scalar = 0.5,
    kernel: Implementation = "xla",
    uniforms: Float[Array, "B N K"] | None = None,
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
      guidance: g, 0 for none; see `binary_diffusion.guided`.
      temperature: of the guided logits; 0 thresholds them.
      kernel: what samples the bits, see `kernels.binary_sampling.resolve`.
      uniforms: uniform numbers to use in place of the keys'.

    Returns:
      bits of 0 and 1.
    """
    # Unrolled, XLA would copy every layer's slice of the stacked weights at once for each token.
    network = network.clone(run=dataclasses.replace(network.run, unroll=False))
    apply = _bound(network, params)
    cache = apply(text, method="start_cache")

    def step(
        carry: tuple[Any, Float32[Array, "B K"]], index: Int[Array, ""]
    ) -> tuple[tuple[Any, Float32[Array, "B K"]], Float32[Array, "B K"]]:
        cache, bits = carry
        logits, cache = apply(jnp.concatenate([bits, bits]), index, cache, text_mask, method="step")
        logits = logits.reshape(2, *bits.shape)
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
        return (cache, bits), bits

    first = jnp.zeros((keys.shape[0], network.bits))
    _, bits = jax.lax.scan(step, (cache, first), jnp.arange(network.num_tokens))
    return bits.swapaxes(0, 1)
