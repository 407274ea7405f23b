"""Autoregressive sampling without a cache, to compare with."""

import jax
import jax.numpy as jnp

from instella_jax.models import binary_diffusion


def sample_ar(network, params, text, mask, uniforms, guidance, temperature):
    """Computes all positions anew for each token, as the published code does: bits [B, N, K]."""

    def draw(n, bits):
        both = jnp.concatenate([bits, bits])[:, :-1]
        logits = network.apply({"params": params}, both, text, mask)
        logits = jax.lax.dynamic_index_in_dim(logits, n, axis=1, keepdims=False)
        conditional, unconditional = jnp.split(logits, 2)
        logits = binary_diffusion.guided(conditional, unconditional, guidance, temperature)
        uniform = jax.lax.dynamic_index_in_dim(uniforms, n, axis=1, keepdims=False)
        return bits.at[:, n].set((uniform < jax.nn.sigmoid(logits)).astype(bits.dtype))

    return jax.lax.fori_loop(0, uniforms.shape[1], draw, jnp.zeros_like(uniforms))
