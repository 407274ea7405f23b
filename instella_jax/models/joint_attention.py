"""What both generators share: attention of image tokens to the prompt and to each other.

Axes: B batch, R images of B texts, T image positions, L text length, S positions of a cache, H
heads, Dh head width, D width = H * Dh, N latent tokens, K bits, Dt width of text features.
"""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from instella_jax.models.attention import attend
from instella_jax.models.layers import Execution, linear, partitioned, rms_norm

# Keys and values of one layer's positions, of all layers', of one position, and of a cache, which
# has the heads before the positions, a pair for each layer.
KeysValues = tuple[Float[Array, "B S H Dh"], Float[Array, "B S H Dh"]]
TextKeysValues = tuple[Float[Array, "layers B L H Dh"], Float[Array, "layers B L H Dh"]]
OneKeysValues = tuple[Float[Array, "B H Dh"], Float[Array, "B H Dh"]]
LayerCache = tuple[Float[Array, "B H S Dh"], Float[Array, "B H S Dh"]]
Cache = tuple[LayerCache, ...]


class JointAttention(nn.Module):
    """Queries from the image; keys and values from [text ; image]; q and k normed per head."""

    num_heads: int
    head_dim: int
    text_width: int
    run: Execution
    xavier: bool = False

    def setup(self):
        width = self.num_heads * self.head_dim

        def project() -> nn.Dense:
            return linear(width, width, ("embed", "heads"), self.run, xavier=self.xavier)

        self.q, self.k, self.v = project(), project(), project()
        self.o = linear(width, width, ("heads", "embed"), self.run, xavier=self.xavier)
        self.q_norm, self.k_norm = rms_norm(self.run), rms_norm(self.run)
        self.text = linear(
            width, self.text_width, (None, "embed"), self.run, use_bias=True, xavier=self.xavier
        )

    def _heads(self, x: Float[Array, "B T D"]) -> Float[Array, "B T H Dh"]:
        return x.reshape(*x.shape[:2], self.num_heads, self.head_dim)

    def keys_values(self, h: Float[Array, "B S D"]) -> KeysValues:
        """Return keys and values of positions `h`."""
        return self.k_norm(self._heads(self.k(h))), self._heads(self.v(h))

    def text_keys_values(self, features: Float[Array, "B S Dt"]) -> KeysValues:
        """Return keys and values of one layer's text features."""
        return self.keys_values(self.text(features.astype(self.run.dtype)))

    def __call__(
        self, h: Float[Array, "R T D"], text: KeysValues, visible: Bool[Array, "B 1 _ _"]
    ) -> Float[Array, "R T D"]:
        """Attend from `h` to [text ; h].

        Args:
          h: R = B * draws images, those that share a text one after the other.
          text: keys and values of B texts.
          visible: who sees what, Q = draws * T; see `visible_to_images`.
        """
        rows = text[0].shape[0]

        def of_one_text(x: Float[Array, "R T H Dh"]) -> Float[Array, "B Q H Dh"]:
            return x.reshape(rows, -1, *x.shape[2:])

        q = self.q_norm(self._heads(self.q(h)))
        k, v = (
            jnp.concatenate([of_text, of_one_text(of_image)], axis=1)
            for of_text, of_image in zip(text, self.keys_values(h), strict=True)
        )
        mixed = attend(of_one_text(q), k, v, visible, self.run.attention)
        return self.o(mixed.reshape(h.shape))

    def recall(
        self, h: Float[Array, "B D"], cache: LayerCache, visible: Bool[Array, "B S"]
    ) -> tuple[Float[Array, "B D"], OneKeysValues]:
        """Attend from one position to a cache and to itself.

        The cache is only read, and has the heads before the positions: on a CPU that is several
        times as fast as writing this position into it and calling `attend`.

        Args:
          h: the position.
          cache: keys and values of others.
          visible: which of them are seen.

        Returns:
          the result, and this position's keys and values.
        """
        q = self.q_norm(self._heads(self.q(h)[:, None]))[:, 0]
        own_k, own_v = (x[:, 0] for x in self.keys_values(h[:, None]))
        k, v = cache
        past = jnp.einsum("bhd,bhsd->bhs", q, k, preferred_element_type=jnp.float32)
        past = jnp.where(visible[:, None], past, jnp.finfo(jnp.float32).min)
        own = jnp.einsum("bhd,bhd->bh", q, own_k, preferred_element_type=jnp.float32)[..., None]
        logits = jnp.concatenate([past, own], axis=-1) / math.sqrt(self.head_dim)
        weights = jax.nn.softmax(logits).astype(v.dtype)
        mixed = jnp.einsum("bhs,bhsd->bhd", weights[..., :-1], v) + weights[..., -1:] * own_v
        return self.o(mixed.reshape(h.shape)), (own_k, own_v)


def visible_to_images(
    text_mask: Bool[Array, "R L"], tokens: int, draws: int
) -> Bool[Array, "B 1 _ _"]:
    """Return what the images see of [text ; images], each the text and itself.

    Images that share a text are rows of one attention, Q = draws * tokens of them, in which each is
    hidden from the others: that is faster than to repeat the text's keys and values.

    Args:
      text_mask: true at real tokens, for each of the R = B * draws images.
      tokens: of an image.
      draws: images of a text.
    """
    if draws == 1:
        own = jnp.ones((text_mask.shape[0], tokens), bool)
        return jnp.concatenate([text_mask, own], axis=1)[:, None, None]
    of_text = jnp.repeat(text_mask.reshape(-1, draws, text_mask.shape[1]), tokens, axis=1)
    number = jnp.arange(draws * tokens) // tokens
    own = jnp.broadcast_to(number[:, None] == number, (len(of_text), len(number), len(number)))
    return jnp.concatenate([of_text, own], axis=-1)[:, None]


class JointBlock(nn.Module):
    """A block with `attention` over [text ; image]; `setup` of the class below makes it.

    It is written for `layers.repeat`, its text input being scanned over the layers.
    """

    num_heads: int
    head_dim: int
    num_tokens: int
    text_width: int
    run: Execution
    pos_emb_std: float = 0.0

    def learned_positions(self, positions: int) -> Float[Array, "positions D"]:
        """Return the parameter that is added to the normed input of the attention."""
        return self.param(
            "pos_emb",
            partitioned(nn.initializers.normal(self.pos_emb_std), (None, "embed")),
            (positions, self.num_heads * self.head_dim),
            self.run.param_dtype,
        )

    def text_kv(self, carry: None, features: Float[Array, "B L Dt"]) -> tuple[None, KeysValues]:
        """Return keys and values of one layer's text features."""
        return carry, self.attention.text_keys_values(features)


class JointTransformer(nn.Module):
    """A generator made of `blocks`, one `JointBlock` for each layer of text features.

    Attributes:
      num_layers: number of blocks.
      num_heads: H.
      head_dim: Dh.
      num_tokens: N.
      bits: K.
      text_width: Dt, width of the text features.
      run: how it is computed.
      pos_emb_std: standard deviation of the initial position embeddings; 0 as published. Codes have
        a meaning of their own at each position, which a small model with few steps learns several
        times as fast from embeddings that differ from the start.
    """

    num_layers: int
    num_heads: int
    head_dim: int
    num_tokens: int
    bits: int
    text_width: int
    run: Execution = Execution()
    pos_emb_std: float = 0.0

    @property
    def block_sizes(self) -> tuple[Any, ...]:
        """What a `JointBlock` is made with."""
        sizes = self.num_heads, self.head_dim, self.num_tokens, self.text_width
        return *sizes, self.run, self.pos_emb_std

    def text_kv(self, features: Float[Array, "layers B L Dt"]) -> TextKeysValues:
        """Return keys and values of a prompt for all layers, the same at every sampling step."""
        _, keys_values = self.blocks.text_kv(None, features)
        return keys_values
