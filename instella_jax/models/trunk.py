"""The tokenizer's blocks, over latent tokens and image patches, and its changes of grid.

The mathematics: "Tokenizer" in docs/model.md.

Axes: B batch, N latent tokens, T all tokens, D width; S rows that are wanted; an image grid has
`rows` x `columns` patches.
"""

import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from instella_jax.models.attention import attend
from instella_jax.models.convolution import convolve
from instella_jax.models.layers import (
    Execution,
    SwiGLU,
    linear,
    partitioned,
    recomputed,
    repeat,
    rms_norm,
    rope_tables,
    rotate,
    torch_uniform,
)
from instella_jax.models.tokenizer_config import TokenizerConfig, position_ids
from instella_jax.runtime.sharding import constrain

# The collection of what is tapped on the way.
STATES = "states"
# From which row of a sequence to which, None for its end.
Rows = tuple[int, int | None]
ALL: Rows = (0, None)


class Attention(nn.Module):
    """Self-attention with per-head RMSNorm of q and k, then rotary positions; no biases."""

    num_heads: int
    head_dim: int
    run: Execution
    wanted: Rows = ALL

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], cos: Float[Array, "T Dh"], sin: Float[Array, "T Dh"]
    ) -> Float[Array, "B S D"]:
        """Return the wanted rows of the result."""
        width, rows = x.shape[-1], slice(*self.wanted)

        def heads(name: str, x: Float[Array, "B R D"]) -> Float[Array, "B R H Dh"]:
            y = linear(
                self.num_heads * self.head_dim, width, ("embed", "heads"), self.run, name=name
            )(x)
            return y.reshape(*y.shape[:2], self.num_heads, self.head_dim)

        q = rms_norm(self.run, "q_norm")(heads("q", x[:, rows]))
        k = rms_norm(self.run, "k_norm")(heads("k", x))
        q, k = rotate(q, cos[rows], sin[rows]), rotate(k, cos, sin)
        mixed = attend(q, k, heads("v", x), None, self.run.attention)
        return linear(width, mixed.shape[-1], ("heads", "embed"), self.run, name="o")(mixed)


class Block(nn.Module):
    """Pre-norm transformer block, written for `layers.repeat`: (carry, output)."""

    num_heads: int
    head_dim: int
    run: Execution
    wanted: Rows = ALL

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], cos: Float[Array, "T Dh"], sin: Float[Array, "T Dh"]
    ) -> tuple[Float[Array, "B S D"], None]:
        """Return the wanted rows of the result."""
        x = constrain(x)
        h = rms_norm(self.run, "attention_norm")(x)
        attention = Attention(
            self.num_heads, self.head_dim, self.run, self.wanted, name="attention"
        )
        x = x[:, slice(*self.wanted)] + attention(h, cos, sin)
        h = rms_norm(self.run, "mlp_norm")(x)
        x += SwiGLU(4 * x.shape[-1], self.run, name="mlp")(h)
        return x, None


def convolution(features: int, width: int, run: Execution, stride: int) -> nn.Conv:
    """Return a 3x3 convolution [B, h, w, width] -> features, sharded like a dense layer."""
    axes = (None, None, None, "embed")
    fan_in = 9 * width
    return nn.Conv(
        features,
        (3, 3),
        strides=stride,
        padding=1,
        conv_general_dilated=convolve,
        dtype=run.dtype,
        param_dtype=run.param_dtype,
        kernel_init=partitioned(torch_uniform(fan_in), axes),
        bias_init=partitioned(torch_uniform(fan_in), (None,)),
        name="conv",
    )


class Downsample(nn.Module):
    """Halves the grid: 3x3 convolution of stride 2 plus the 2x2 average."""

    run: Execution

    @nn.compact
    def __call__(
        self, x: Float[Array, "B rows columns D"]
    ) -> Float[Array, "B rows//2 columns//2 D"]:
        width = x.shape[-1]
        conv = convolution(width, width, self.run, stride=2)(x)
        return conv + nn.avg_pool(x, (2, 2), (2, 2))


class Upsample(nn.Module):
    """Doubles the grid: 3x3 convolution and pixel shuffle, plus nearest neighbours."""

    run: Execution

    @nn.compact
    def __call__(self, x: Float[Array, "B rows columns D"]) -> Float[Array, "B rows*2 columns*2 D"]:
        batch, rows, columns, width = x.shape
        conv = convolution(4 * width, width, self.run, stride=1)(x)
        shuffled = conv.reshape(batch, rows, columns, width, 2, 2).transpose(0, 1, 4, 2, 5, 3)
        shuffled = shuffled.reshape(batch, 2 * rows, 2 * columns, width)
        return shuffled + x.repeat(2, axis=1).repeat(2, axis=2)


class Trunk(nn.Module):
    """Blocks over [latent tokens ; image patches], with a change of grid between segments.

    Only one half of what the last block gives is used, `latent_wanted` says which; where the
    depth is unrolled, the other half is not computed. What the image positions are after block
    `tapped` is sown as "tapped" among the "states", which cost nothing where nobody asks for them.
    """

    config: TokenizerConfig
    num_layers: int
    num_heads: int
    head_dim: int
    resample_after: tuple[int, ...]
    resample: type[nn.Module]
    latent_wanted: bool
    run: Execution
    tapped: int | None = None

    @nn.compact
    def __call__(
        self,
        latent: Float[Array, "B N D"],
        image: Float[Array, "B rows columns D"],
        scale: int | None,
    ) -> Float[Array, "B N D"] | Float[Array, "B rows_out columns_out D"]:
        """Run all blocks.

        Args:
          latent: latent tokens.
          image: image tokens on the first grid.
          scale: span of the coordinates on that grid, None for plain indices.

        Returns:
          What is wanted of the last block's output, latent or image.
        """
        batch, tokens, width = latent.shape
        ends = [*(i + 1 for i in sorted(self.resample_after)), self.num_layers]
        start = 0
        for segment, end in enumerate(ends):
            if segment:
                image = self.resample(self.run, name=f"resample_{segment - 1}")(image)
                if scale is not None:
                    scale = scale // 2 if self.resample is Downsample else scale * 2
            if end > start:
                rows, columns = image.shape[1:3]
                ids = position_ids(self.config, rows, columns, scale)
                cos, sin = map(
                    jnp.asarray, rope_tables(ids, self.config.rope_axes, self.config.rope_theta)
                )
                x = jnp.concatenate([latent, image.reshape(batch, -1, width)], axis=1)
                name, last = f"blocks_{segment}", end == self.num_layers
                tap = None
                if self.tapped is not None and start <= self.tapped < end:
                    tap = self.tapped + 1 - start
                run = functools.partial(self._run, name, end - start, tap=tap, grid=(rows, columns))
                if not last:
                    x = run(ALL, x, cos, sin)
                    latent, image = x[:, :tokens], x[:, tokens:]
                elif self.latent_wanted:
                    latent = run((0, tokens), x, cos, sin)
                else:
                    image = run((tokens, None), x, cos, sin)
                image = image.reshape(batch, rows, columns, width)
            start = end
        return latent if self.latent_wanted else image

    def _run(
        self,
        name: str,
        count: int,
        wanted: Rows,
        x: Float[Array, "B T D"],
        cos: Float[Array, "T Dh"],
        sin: Float[Array, "T Dh"],
        *,
        tap: int | None,
        grid: tuple[int, int],
    ) -> Float[Array, "B S D"]:
        """Return the wanted rows of `x` after `count` blocks, and sow the image after `tap`."""
        sizes = (self.num_heads, self.head_dim, self.run)
        blocks = repeat(Block, count, self.run)(*sizes, name=name)
        if not self.is_mutable_collection(STATES):
            tap = None
        skips = self.run.unroll and wanted != ALL
        if self.is_initializing() or not (skips or tap):
            return blocks(x, cos, sin)[0][:, slice(*wanted)]
        params = nn.unbox(blocks.variables["params"])

        def sow(x: Float[Array, "B S D"]) -> None:
            rows, columns = grid
            image = x[:, x.shape[1] - rows * columns :]
            self.sow(STATES, "tapped", image.reshape(len(x), rows, columns, x.shape[-1]))

        if not skips:
            for first, end in itertools.pairwise(sorted({0, tap or count, count})):
                some = repeat(Block, end - first, self.run)(*sizes, parent=None)
                own = jax.tree.map(lambda p, a=first, b=end: p[a:b], params)
                x, _ = some.apply({"params": own}, x, cos, sin)
                if end == tap:
                    sow(x)
            return x[:, slice(*wanted)]
        # All layers of a scan do the same; unrolled, the last one leaves out what nobody reads.
        for layer in range(count):
            block = recomputed(Block, self.run)(
                *sizes, wanted if layer == count - 1 else ALL, parent=None
            )
            own = jax.tree.map(lambda p, layer=layer: p[layer], params)
            x, _ = block.apply({"params": own}, x, cos, sin)
            if layer + 1 == tap:
                sow(x)
        return x
