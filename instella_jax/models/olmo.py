"""OLMo, the language model whose hidden states describe the prompt.

The mathematics: "Text features" in docs/model.md.

Axes: B batch, L text length, H heads, D width.
"""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int, Shaped

from instella_jax.models.attention import attend
from instella_jax.models.layers import (
    Execution,
    SwiGLU,
    layer_norm,
    linear,
    partitioned,
    repeat,
    rotate,
)
from instella_jax.runtime.sharding import constrain

NORM_EPSILON = 1e-5


@dataclasses.dataclass(frozen=True)
class OlmoConfig:
    """Sizes of the language model; the defaults are those of AMD-OLMo-1B.

    Attributes:
      vocab_size: rows of the embedding.
      hidden_size: D.
      intermediate_size: hidden width of the MLP.
      num_hidden_layers: blocks.
      num_attention_heads: query heads; they divide D.
      num_key_value_heads: key and value heads; they divide the query heads.
      rope_theta: base of the rotary frequencies.
      clip_qkv: bound on queries, keys and values after their projection, None for no bound.
    """

    vocab_size: int = 50_304
    hidden_size: int = 2048
    intermediate_size: int = 8192
    num_hidden_layers: int = 16
    num_attention_heads: int = 16
    num_key_value_heads: int = 16
    rope_theta: float = 10_000.0
    clip_qkv: float | None = None

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


def rotary_tables(
    length: int, head_dim: int, theta: float
) -> tuple[Float32[np.ndarray, "{length} {head_dim}"], Float32[np.ndarray, "{length} {head_dim}"]]:
    """Return cosines and sines of the positions 0 to `length` - 1.

    Here each half of the head carries all frequencies, unlike `layers.rope_tables`.
    """
    frequencies = theta ** (-np.arange(0, head_dim, 2) / head_dim)
    angle = np.tile(np.arange(length)[:, None] * frequencies, 2)
    return np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)


class Block(nn.Module):
    """Pre-norm decoder block, written for `layers.repeat`: its output is the hidden state."""

    config: OlmoConfig
    run: Execution

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B L D"],
        cos: Float[Array, "L Dh"],
        sin: Float[Array, "L Dh"],
        visible: Bool[Array, "B 1 L L"],
    ) -> tuple[Float[Array, "B L D"], Float[Array, "B L D"]]:
        c, run = self.config, self.run
        x = constrain(x)
        h = layer_norm(x, NORM_EPSILON)

        def heads(name: str, count: int) -> Float[Array, "B L {count} Dh"]:
            axes = ("embed", "heads")
            y = linear(count * c.head_dim, c.hidden_size, axes, run, name=name)(h)
            if c.clip_qkv is not None:
                y = jnp.clip(y, -c.clip_qkv, c.clip_qkv)
            return y.reshape(*y.shape[:2], count, c.head_dim)

        q = rotate(heads("q", c.num_attention_heads), cos, sin)
        k = rotate(heads("k", c.num_key_value_heads), cos, sin)
        mixed = attend(q, k, heads("v", c.num_key_value_heads), visible, run.attention)
        x += linear(c.hidden_size, mixed.shape[-1], ("heads", "embed"), run, name="o")(mixed)
        x += SwiGLU(c.intermediate_size, run, name="mlp")(layer_norm(x, NORM_EPSILON))
        return x, x


class Olmo(nn.Module):
    """The language model without its head."""

    config: OlmoConfig
    run: Execution = Execution()

    @nn.compact
    def __call__(
        self, ids: Int[Array, "B L"], mask: Shaped[Array, "B L"]
    ) -> Float[Array, "layers B L D"]:
        """Return the hidden states of a batch of prompts.

        Args:
          ids: token ids. Positions count from the start of the row, padding included.
          mask: non-zero at real tokens. A padding position that sees no real token
            attends to all positions alike.

        Returns:
          the embedding, then the state after each block, the last of them after the final norm.
          Block i of a generator reads number i + 1.
        """
        c, run = self.config, self.run
        embedding = self.param(
            "embed",
            partitioned(nn.initializers.normal(0.02), (None, "embed")),
            (c.vocab_size, c.hidden_size),
            run.param_dtype,
        )
        x = jnp.take(embedding, ids, axis=0).astype(run.dtype)
        length = ids.shape[1]
        cos, sin = map(jnp.asarray, rotary_tables(length, c.head_dim, c.rope_theta))
        causal = jnp.tril(jnp.ones((length, length), bool))
        visible = causal & mask.astype(bool)[:, None, None, :]
        _, states = repeat(Block, c.num_hidden_layers, run)(c, run, name="blocks")(
            x, cos, sin, visible
        )
        last = layer_norm(states[-1:], NORM_EPSILON)
        return jnp.concatenate([x[None], states[:-1], last]).astype(run.output_dtype)
