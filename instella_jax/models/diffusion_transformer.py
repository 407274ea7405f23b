"""The diffusion generator: noisy bits, time and prompt -> flip logits.

The mathematics: "Diffusion generator" in docs/model.md.

Axes: B batch, N latent tokens, K bits, L text length, H heads, Dh head width, D = H * Dh.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from instella_jax.models.joint_attention import JointAttention, KeysValues
from instella_jax.models.layers import Execution, GeluMLP, layer_norm, linear, partitioned, repeat
from instella_jax.runtime.sharding import constrain


def modulate(x: jax.Array, scale: jax.Array, shift: jax.Array) -> jax.Array:
    """Norm x [B, N, D] without parameters, then scale and shift it by [B, D] each."""
    return layer_norm(x) * (1.0 + scale[:, None]) + shift[:, None]


class Block(nn.Module):
    """One block, written for `layers.repeat`; its text input is scanned over the layers."""

    num_heads: int
    head_dim: int
    num_tokens: int
    text_width: int
    run: Execution

    def setup(self):
        """Build the parts."""
        width = self.num_heads * self.head_dim
        self.attention = JointAttention(
            self.num_heads, self.head_dim, self.text_width, self.run, xavier=True
        )
        self.modulation = linear(
            6 * width, width, ("embed", None), self.run, use_bias=True, xavier=True
        )
        self.pos_emb = self.param(
            "pos_emb",
            partitioned(nn.initializers.zeros_init(), (None, "embed")),
            (self.num_tokens, width),
            self.run.param_dtype,
        )
        self.mlp = GeluMLP(self.run, xavier=True)

    def __call__(
        self, x: jax.Array, text: jax.Array | KeysValues, condition: jax.Array, visible: jax.Array
    ) -> tuple[jax.Array, None]:
        """Map x [B, N, D].

        Args:
          x: [B, N, D].
          text: this layer's features [B, L, Dt], or keys and values made of them.
          condition: SiLU of the time embedding, [B, D].
          visible: bool [B, 1, 1, L + N].
        """
        if not isinstance(text, tuple):
            text = self.attention.text_keys_values(text)
        shift1, scale1, gate1, shift2, scale2, gate2 = jnp.split(
            self.modulation(condition), 6, axis=-1
        )
        x = constrain(x)
        h = modulate(x, scale1, shift1) + self.pos_emb.astype(x.dtype)
        x += gate1[:, None] * self.attention(h, text, visible)
        x += gate2[:, None] * self.mlp(modulate(x, scale2, shift2))
        return x, None

    def text_kv(self, carry: None, features: jax.Array) -> tuple[None, KeysValues]:
        """Return keys and values of one layer's text features [B, L, Dt]."""
        return carry, self.attention.text_keys_values(features)


class DiffusionTransformer(nn.Module):
    """The network; `binary_diffusion` gives its output a meaning.

    Attributes:
      num_layers: blocks, one for each layer of text features.
      num_heads: H.
      head_dim: Dh.
      num_tokens: N.
      bits: K.
      text_width: Dt, width of the text features.
      run: how it is computed.
    """

    num_layers: int
    num_heads: int
    head_dim: int
    num_tokens: int
    bits: int
    text_width: int
    run: Execution = Execution()

    def setup(self):
        """Build the parts."""
        width, run = self.num_heads * self.head_dim, self.run
        # One number per image, embedded once: bfloat16 would blur neighbouring times.
        exact = dataclasses.replace(run, dtype="float32")
        options: dict[str, Any] = dict(use_bias=True, xavier=True)
        self.time_in = linear(width, 1, (None, "embed"), exact, **options)
        self.time_out = linear(width, width, ("embed", None), exact, **options)
        self.bits_in = linear(width, self.bits, (None, "embed"), run, **options)
        blocks = repeat(
            Block,
            self.num_layers,
            run,
            methods={
                "__call__": (0, nn.broadcast, nn.broadcast),
                "text_kv": 0,
            },
        )
        self.blocks = blocks(self.num_heads, self.head_dim, self.num_tokens, self.text_width, run)
        self.modulation = linear(2 * width, width, ("embed", None), run, **options)
        self.bits_out = linear(self.bits, width, ("embed", None), run, **options)

    def __call__(
        self, z: jax.Array, t: jax.Array, text: jax.Array | KeysValues, text_mask: jax.Array
    ) -> jax.Array:
        """Predict flip logits.

        Args:
          z: noisy bits, [B, N, K] of 0 and 1.
          t: times in [0, 1], [B]; 0 is clean.
          text: features [layers, B, L, Dt], or the keys and values that `text_kv` made of them.
          text_mask: [B, L], non-zero at real tokens. Where a row has none (the empty prompt),
            that image attends to itself alone.

        Returns:
          [B, N, K]: how much more likely than not each bit of z is flipped.
        """
        run = self.run
        embedded = self.time_out(nn.silu(self.time_in(t[:, None].astype(jnp.float32))))
        condition = nn.silu(embedded).astype(run.dtype)
        text_mask = text_mask.astype(bool)
        visible = jnp.concatenate([text_mask, jnp.ones(z.shape[:2], bool)], axis=1)
        x = self.bits_in(z.astype(run.dtype))
        x, _ = self.blocks(x, text, condition, visible[:, None, None, :])
        scale, shift = jnp.split(self.modulation(condition), 2, axis=-1)
        return self.bits_out(modulate(x, scale, shift)).astype(run.output_dtype)

    def text_kv(self, features: jax.Array) -> KeysValues:
        """Return keys and values of a prompt for all layers; they do not depend on the time.

        Args:
          features: [layers, B, L, Dt].

        Returns:
          k, v: [layers, B, L, H, Dh] each.
        """
        _, keys_values = self.blocks.text_kv(None, features)
        return keys_values
