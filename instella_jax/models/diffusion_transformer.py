"""The diffusion generator: noisy bits, time and prompt -> flip logits.

The mathematics: "Diffusion generator" in docs/model.md.

Axes: B texts, R images of them, N latent tokens, K bits, L text length, Dt width of text features,
H heads, Dh head width, D = H * Dh, S times, M = 6 D shifts, scales and gates of a block.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Shaped

from instella_jax.models.joint_attention import (
    JointAttention,
    JointBlock,
    JointTransformer,
    KeysValues,
    TextKeysValues,
    visible_to_images,
)
from instella_jax.models.layers import GeluMLP, Params, layer_norm, linear, repeat
from instella_jax.runtime.sharding import constrain

# Shifts, scales and gates of the blocks, and shifts and scales of the output, side by side.
Modulations = tuple[Float[Array, "layers S M"], Float[Array, "S _"]]


def modulate(
    x: Float[Array, "B N D"], scale: Float[Array, "#B D"], shift: Float[Array, "#B D"]
) -> Float[Array, "B N D"]:
    """Norm `x` without parameters, then scale and shift it."""
    return layer_norm(x) * (1.0 + scale[:, None]) + shift[:, None]


class Block(JointBlock):
    """Joint attention and an MLP, each scaled, shifted and gated by the time."""

    def setup(self):
        width = self.num_heads * self.head_dim
        self.attention = JointAttention(
            self.num_heads, self.head_dim, self.text_width, self.run, xavier=True
        )
        self.modulation = linear(
            6 * width, width, ("embed", None), self.run, use_bias=True, xavier=True
        )
        self.pos_emb = self.learned_positions(self.num_tokens)
        self.mlp = GeluMLP(self.run, xavier=True)

    def __call__(
        self,
        x: Float[Array, "R N D"],
        text: Float[Array, "B S Dt"] | KeysValues,
        condition: Float[Array, "R D"],
        visible: Bool[Array, "B 1 _ _"],
    ) -> tuple[Float[Array, "R N D"], None]:
        """Apply the block.

        Args:
          x: the image.
          text: this layer's features, or keys and values made of them.
          condition: SiLU of the time embedding.
          visible: what of [text ; images] is seen.
        """
        return self.modulated(x, text, self.modulation(condition), visible)

    def modulations(
        self, carry: None, condition: Float[Array, "S D"]
    ) -> tuple[None, Float[Array, "S M"]]:
        """Return the block's shifts, scales and gates, side by side."""
        return carry, self.modulation(condition)

    def modulated(
        self,
        x: Float[Array, "R N D"],
        text: Float[Array, "B S Dt"] | KeysValues,
        modulation: Float[Array, "#R M"],
        visible: Bool[Array, "B 1 _ _"],
    ) -> tuple[Float[Array, "R N D"], None]:
        """Apply the block with these shifts, scales and gates, see `__call__`."""
        if not isinstance(text, tuple):
            text = self.attention.text_keys_values(text)
        shift1, scale1, gate1, shift2, scale2, gate2 = jnp.split(modulation, 6, axis=-1)
        x = constrain(x)
        h = modulate(x, scale1, shift1) + self.pos_emb.astype(x.dtype)
        x += gate1[:, None] * self.attention(h, text, visible)
        x += gate2[:, None] * self.mlp(modulate(x, scale2, shift2))
        return x, None


class DiffusionTransformer(JointTransformer):
    """The network; `binary_diffusion` gives its output a meaning."""

    def setup(self):
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
                "modulated": (0, 0, nn.broadcast),
                "modulations": nn.broadcast,
                "text_kv": 0,
            },
        )
        self.blocks = blocks(*self.block_sizes)
        self.modulation = linear(2 * width, width, ("embed", None), run, **options)
        self.bits_out = linear(self.bits, width, ("embed", None), run, **options)

    def _condition(self, t: Float[Array, " S"]) -> Float[Array, "S D"]:
        embedded = self.time_out(nn.silu(self.time_in(t[:, None].astype(jnp.float32))))
        return nn.silu(embedded).astype(self.run.dtype)

    def modulations(self, t: Float[Array, " S"]) -> Modulations:
        """Return what the call takes in place of times, for loops that know theirs in advance.

        Their steps then do not read the weights that make them, a third of a block's.
        """
        condition = self._condition(t)
        _, of_blocks = self.blocks.modulations(None, condition)
        return of_blocks, self.modulation(condition)

    def __call__(
        self,
        z: Float[Array, "R N K"],
        t: Float[Array, " R"] | Modulations,
        text: Float[Array, "layers B L Dt"] | TextKeysValues,
        text_mask: Shaped[Array, "R L"],
        layers: Sequence[Params] | None = None,
    ) -> Float[Array, "R N K"]:
        """Predict flip logits.

        Args:
          z: noisy bits, 0 and 1; as many images of each text, one after the other.
          t: times in [0, 1], 0 is clean; or `modulations` of them, or of one for all images.
          text: features, or the keys and values that `text_kv` made of them.
          text_mask: non-zero at real tokens. Where a row has none (the empty prompt),
            that image attends to itself alone.
          layers: the parameters of each block, from `layers.unstack`, with which `text` must be
            keys and values and `t` modulations: for loops, whose every step would copy slices of
            the stacked ones. None for the stacked ones.

        Returns:
          how much more likely than not each bit of z is flipped.
        """
        dtype = self.run.dtype
        texts = (text[0] if isinstance(text, tuple) else text).shape[1]
        visible = visible_to_images(text_mask.astype(bool), z.shape[1], z.shape[0] // texts)
        x = self.bits_in(z.astype(dtype))
        if not isinstance(t, tuple):
            condition = self._condition(t)
            x, _ = self.blocks(x, text, condition, visible)
            of_output = self.modulation(condition)
        else:
            of_blocks, of_output = t
            if layers is None:
                x, _ = self.blocks.modulated(x, text, of_blocks, visible)
            else:
                block = Block(*self.block_sizes, parent=None)
                for own, keys, values, modulation in zip(layers, *text, of_blocks, strict=True):
                    x, _ = block.apply(
                        {"params": own}, x, (keys, values), modulation, visible, method="modulated"
                    )
        scale, shift = jnp.split(of_output, 2, axis=-1)
        return self.bits_out(modulate(x, scale, shift)).astype(self.run.output_dtype)
