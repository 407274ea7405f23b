"""The autoregressive generator: bits of earlier tokens and prompt -> logits.

The mathematics: "Autoregressive generator" in docs/model.md.

Axes: B batch, N latent tokens, T of them, K bits, L text length, S = L + N, Dt width of text
features, H heads, Dh head width, D = H * Dh.
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from instella_jax.models.joint_attention import (
    Cache,
    JointAttention,
    JointBlock,
    JointTransformer,
    KeysValues,
    LayerCache,
    OneKeysValues,
    TextKeysValues,
)
from instella_jax.models.layers import GeluMLP, Params, linear, partitioned, repeat, rms_norm
from instella_jax.runtime.sharding import constrain


class Block(JointBlock):
    """RMS norms, joint attention and an MLP, at all positions or at one with a cache."""

    def setup(self):
        self.attention_norm, self.mlp_norm = rms_norm(self.run), rms_norm(self.run)
        self.attention = JointAttention(self.num_heads, self.head_dim, self.text_width, self.run)
        # The published weights have one position more than there are tokens.
        self.pos_emb = self.learned_positions(self.num_tokens + 1)
        self.mlp = GeluMLP(self.run)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        text: Float[Array, "B S Dt"] | KeysValues,
        visible: Bool[Array, "B 1 T S+T"],
    ) -> tuple[Float[Array, "B T D"], None]:
        """Apply the block to all positions at once.

        Args:
          x: the image.
          text: this layer's features, or keys and values made of them.
          visible: what of [text ; image] each position sees.
        """
        if not isinstance(text, tuple):
            text = self.attention.text_keys_values(text)
        x = constrain(x)
        h = self.attention_norm(x) + self.pos_emb[: x.shape[1]].astype(x.dtype)
        x += self.attention(h, text, visible)
        return x + self.mlp(self.mlp_norm(x)), None

    def step(
        self,
        x: Float[Array, "B D"],
        cache: LayerCache,
        index: Int[Array, ""],
        visible: Bool[Array, "B S"],
    ) -> tuple[Float[Array, "B D"], OneKeysValues]:
        """Apply the block to one position, those before it being in the cache.

        Args:
          x: the image at this position.
          cache: this layer's keys and values of [text ; image].
          index: the position.
          visible: what of the cache is before this position.

        Returns:
          x, and the keys and values of this position.
        """
        h = self.attention_norm(x) + self.pos_emb[index].astype(x.dtype)
        mixed, new = self.attention.recall(h, cache, visible)
        x += mixed
        return x + self.mlp(self.mlp_norm(x)), new


class ArTransformer(JointTransformer):
    """The network: position i predicts the bits of token i, each independently."""

    def setup(self):
        width, run = self.num_heads * self.head_dim, self.run
        self.bits_in = linear(width, self.bits, (None, "embed"), run, use_bias=True)
        self.split_token = self.param(
            "split_token",
            partitioned(nn.initializers.normal(0.02), ("embed",)),
            (width,),
            run.param_dtype,
        )
        blocks = repeat(
            Block,
            self.num_layers,
            run,
            methods={"__call__": (0, nn.broadcast), "text_kv": 0},
        )
        self.blocks = blocks(*self.block_sizes)
        self.out_norm = rms_norm(run)
        self.bits_out = linear(self.bits, width, ("embed", None), run, use_bias=True)

    def __call__(
        self,
        z: Float[Array, "B T K"],
        text: Float[Array, "layers B L Dt"] | TextKeysValues,
        text_mask: Shaped[Array, "B L"],
    ) -> Float[Array, "B T+1 K"]:
        """Predict all tokens, each from those before it.

        Args:
          z: bits of the first T tokens, 0 and 1; N - 1 of them in training.
          text: features, or the keys and values that `text_kv` made of them.
          text_mask: non-zero at real tokens. Where a row has none (the empty prompt),
            that image attends to itself alone.

        Returns:
          logits of the bits of the first T + 1 tokens.
        """
        batch, length = z.shape[0], z.shape[1] + 1
        split = self.split_token.astype(self.run.dtype)
        split = jnp.broadcast_to(split, (batch, 1, split.shape[0]))
        x = jnp.concatenate([split, self.bits_in(z.astype(self.run.dtype))], axis=1)
        causal = jnp.broadcast_to(
            jnp.tril(jnp.ones((length, length), bool)), (batch, 1, length, length)
        )
        of_text = text_mask.astype(bool)[:, None, None, :]
        of_text = jnp.broadcast_to(of_text, (batch, 1, length, text_mask.shape[1]))
        x, _ = self.blocks(x, text, jnp.concatenate([of_text, causal], axis=-1))
        return self._logits(x)

    def _logits(self, x: Float[Array, "*axes D"]) -> Float[Array, "*axes K"]:
        return self.bits_out(self.out_norm(x)).astype(self.run.output_dtype)

    def start_cache(self, text: Float[Array, "layers B L Dt"] | TextKeysValues) -> Cache:
        """Make the cache of a decoding: the prompt's keys and values, then room for N tokens.

        Args:
          text: features, or the keys and values that `text_kv` made of them.
        """
        k, v = text if isinstance(text, tuple) else self.text_kv(text)
        room = ((0, 0), (0, 0), (0, self.num_tokens), (0, 0))
        return tuple(
            (jnp.pad(keys.swapaxes(1, 2), room), jnp.pad(values.swapaxes(1, 2), room))
            for keys, values in zip(k, v, strict=True)
        )

    def step(
        self,
        previous: Float[Array, "B K"],
        index: Int[Array, ""],
        cache: Cache,
        text_mask: Shaped[Array, "B L"],
        layers: Sequence[Params],
    ) -> tuple[Float[Array, "B K"], Cache]:
        """Predict one token from the cache of those before it.

        Args:
          previous: bits of token `index` - 1; not looked at where `index` is 0.
          index: which token.
          cache: from `start_cache` or the previous step.
          text_mask: non-zero at real tokens.
          layers: the parameters of each block, from `layers.unstack`. A loop over the tokens should
            unstack them before it starts, or every step copies them.

        Returns:
          logits of the bits of token `index`, and the cache for the next one.
        """
        batch, length = text_mask.shape
        embedded = self.bits_in(previous.astype(self.run.dtype))
        x = jnp.where(index == 0, self.split_token.astype(self.run.dtype), embedded)
        before = jnp.broadcast_to(jnp.arange(self.num_tokens) < index, (batch, self.num_tokens))
        visible = jnp.concatenate([text_mask.astype(bool), before], axis=1)
        block: Any = Block(*self.block_sizes, parent=None)
        grown = []
        for own, layer in zip(layers, cache, strict=True):
            x, new = block.apply({"params": own}, x, layer, index, visible, method="step")
            k, v = (
                jax.lax.dynamic_update_slice_in_dim(old, here[:, :, None], length + index, axis=2)
                for old, here in zip(layer, new, strict=True)
            )
            grown.append((k, v))
        return self._logits(x), tuple(grown)
