"""The 1D binary tokenizer: an image <-> N tokens of K bits.

The mathematics: "Tokenizer" in docs/model.md.

Axes: B batch, N latent tokens, K bits, D width, P patch; an image grid has `rows` x `columns`
patches. Images are [B, height, width, 3] in [-1, 1].
"""

import dataclasses
import functools
import itertools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Key

from instella_jax.errors import UserError
from instella_jax.models.attention import attend
from instella_jax.models.binary_diffusion import Scalar
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
from instella_jax.runtime.sharding import constrain


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    """Sizes of the tokenizer; the defaults are the published ones.

    Attributes:
      patch_size: P, side of a patch in pixels.
      num_tokens: N.
      bits: K, bits per token.
      encoder_layers: blocks in the encoder.
      encoder_heads: heads in each of them.
      encoder_head_dim: width of a head; D_enc = heads * head width.
      decoder_layers: blocks in the decoder.
      decoder_heads: heads in each of them.
      decoder_head_dim: width of a head; D_dec = heads * head width.
      rope_axes: shares of the head width for (token index, row, column).
      rope_theta: base of the rotary frequencies.
      downsample_after: encoder blocks after which the grid is halved.
      upsample_after: decoder blocks after which the grid is doubled.
      scale: side in pixels that the row and column coordinates span, whatever the resolution;
        None for plain patch indices.
      latent_grid: whether latent tokens also stand on a square grid over the image, in place of
        the published (index, 0, 0). Small models learn faster with it.
    """

    patch_size: int = 16
    num_tokens: int = 128
    bits: int = 64
    encoder_layers: int = 12
    encoder_heads: int = 12
    encoder_head_dim: int = 64
    decoder_layers: int = 16
    decoder_heads: int = 16
    decoder_head_dim: int = 64
    rope_axes: tuple[int, int, int] = (8, 28, 28)
    rope_theta: float = 10_000.0
    downsample_after: tuple[int, ...] = (7,)
    upsample_after: tuple[int, ...] = (7,)
    scale: int | None = 1024
    latent_grid: bool = False

    @property
    def encoder_width(self) -> int:
        """D of the encoder."""
        return self.encoder_heads * self.encoder_head_dim

    @property
    def decoder_width(self) -> int:
        """D of the decoder."""
        return self.decoder_heads * self.decoder_head_dim

    @property
    def multiple(self) -> int:
        """Sides of an image that is encoded and decoded must be multiples of this many pixels."""
        return self.patch_size * 2 ** max(len(self.downsample_after), len(self.upsample_after))

    def grid(self, height: int, width: int, levels: int | None = None) -> tuple[int, int]:
        """Return (rows, columns) of patches of an image.

        Args:
          height: of the image in pixels.
          width: of the image in pixels.
          levels: how often the grid is halved; None for what both encoder and decoder need.

        Raises:
          UserError: if the sides are not multiples of the patch size times 2^levels.
        """
        multiple = self.multiple if levels is None else self.patch_size * 2**levels
        if height <= 0 or width <= 0 or height % multiple or width % multiple:
            raise UserError(
                f"image size {height}x{width} does not fit this tokenizer: both sides must be "
                f"positive multiples of {multiple} pixels"
            )
        return height // self.patch_size, width // self.patch_size


def position_ids(
    config: TokenizerConfig, rows: int, columns: int, scale: int | None
) -> Float32[np.ndarray, "{config.num_tokens}+{rows}*{columns} 3"]:
    """Return ids (token, row, column) of [latent tokens ; image patches].

    With a scale s, rows and columns span [0, s - 1] at every resolution.
    """

    def axis(count: int) -> Float32[np.ndarray, " {count}"]:
        index = np.arange(count, dtype=np.float32)
        if scale is None:
            return index
        return index / np.float32(max(count - 1, 1)) * np.float32(scale - 1)

    latent = np.zeros((config.num_tokens, 3), np.float32)
    latent[:, 0] = np.arange(config.num_tokens)
    if config.latent_grid:
        side = math.ceil(math.sqrt(config.num_tokens))
        place = (np.arange(config.num_tokens)[:, None] // (side, 1)) % side + 0.5
        latent[:, 1:] = place / side * [rows, columns] - 0.5
        if scale is not None:
            span = np.maximum([rows - 1, columns - 1], 1)
            latent[:, 1:] *= (scale - 1) / span
    image = np.zeros((rows, columns, 3), np.float32)
    image[..., 1] = axis(rows)[:, None]
    image[..., 2] = axis(columns)[None, :]
    return np.concatenate([latent, image.reshape(-1, 3)])


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


def to_patches(
    images: Float[Array, "B height width 3"], side: int
) -> Float[Array, "B height//{side} width//{side} {side}*{side}*3"]:
    """Cut images into patches.

    A patch is laid out (row, column, channel), as the decoder's output is.
    """
    batch, height, width, channels = images.shape
    rows, columns = height // side, width // side
    patches = images.reshape(batch, rows, side, columns, side, channels)
    return patches.transpose(0, 1, 3, 2, 4, 5).reshape(batch, rows, columns, -1)


def from_patches(
    patches: Float[Array, "B rows columns {side}*{side}*3"], side: int
) -> Float[Array, "B rows*{side} columns*{side} 3"]:
    """Put patches together again, see `to_patches`."""
    batch, rows, columns, _ = patches.shape
    pixels = patches.reshape(batch, rows, columns, side, side, 3)
    return pixels.transpose(0, 1, 3, 2, 4, 5).reshape(batch, rows * side, columns * side, 3)


def convolution(features: int, width: int, run: Execution, stride: int) -> nn.Conv:
    """Return a 3x3 convolution [B, h, w, width] -> features, sharded like a dense layer."""
    axes = (None, None, None, "embed")
    fan_in = 9 * width
    return nn.Conv(
        features,
        (3, 3),
        strides=stride,
        padding=1,
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


class Encoder(nn.Module):
    """Image -> latent positions."""

    config: TokenizerConfig
    run: Execution

    @nn.compact
    def __call__(self, images: Float[Array, "B height width 3"]) -> Float[Array, "B N D"]:
        c, run = self.config, self.run
        c.grid(images.shape[1], images.shape[2], len(c.downsample_after))
        width = c.encoder_width
        patches = linear(
            width, 3 * c.patch_size**2, (None, "embed"), run, use_bias=True, name="patch_embed"
        )(to_patches(images, c.patch_size))
        latent = self.param(
            "latent_tokens",
            partitioned(nn.initializers.normal(0.02), (None, "embed")),
            (c.num_tokens, width),
            run.param_dtype,
        )
        latent = jnp.broadcast_to(latent.astype(run.dtype), (images.shape[0], *latent.shape))
        trunk = Trunk(
            c, c.encoder_layers, c.encoder_heads, c.encoder_head_dim, c.downsample_after,
            Downsample, True, run, name="trunk",
        )  # fmt: skip
        scale = None if c.scale is None else c.scale // c.patch_size
        latent = trunk(latent, patches, scale)
        latent = rms_norm(run, "out_norm")(latent)
        return linear(width, width, ("embed", None), run, use_bias=True, name="out")(latent)


class Decoder(nn.Module):
    """Latent vectors -> image of any grid."""

    config: TokenizerConfig
    run: Execution
    tapped: int | None = None

    @nn.compact
    def __call__(
        self, latent: Float[Array, "B N D"], height: int, width: int
    ) -> Float[Array, "B {height} {width} 3"]:
        """Return images, nominally in [-1, 1]."""
        c, run = self.config, self.run
        rows, columns = c.grid(height, width, len(c.upsample_after))
        batch, _, encoder_width = latent.shape
        latent = rms_norm(run, "in_norm")(latent)
        latent = linear(
            c.decoder_width, encoder_width, ("embed", None), run, use_bias=True, name="in"
        )(latent)
        shrink = 2 * len(c.upsample_after) or 1
        mask = self.param(
            "mask_token",
            partitioned(nn.initializers.normal(0.02), ("embed",)),
            (c.decoder_width,),
            run.param_dtype,
        )
        grid = (batch, rows // shrink, columns // shrink, c.decoder_width)
        scale = None if c.scale is None else c.scale // c.patch_size // shrink
        trunk = Trunk(
            c, c.decoder_layers, c.decoder_heads, c.decoder_head_dim, c.upsample_after,
            Upsample, False, run, self.tapped, name="trunk",
        )  # fmt: skip
        image = trunk(latent, jnp.broadcast_to(mask.astype(run.dtype), grid), scale)
        image = rms_norm(run, "out_norm")(image)
        pixels = linear(
            3 * c.patch_size**2, c.decoder_width, ("embed", None), run, use_bias=True, name="pixels"
        )(image)
        return from_patches(pixels, c.patch_size)


class TokenizerNetwork(nn.Module):
    """Encoder, quantizer and decoder.

    `encode` gives the logits of the bits; `sample_code` or `hard_code` makes bits of them;
    `decode` makes the image of a code, and can sow what the decoder's image positions are after
    block `tapped`, see `Trunk`.
    """

    config: TokenizerConfig
    run: Execution = Execution()
    tapped: int | None = None

    def setup(self):
        c = self.config
        self.encoder = Encoder(c, self.run)
        self.to_bits = linear(c.bits, c.encoder_width, ("embed", None), self.run, use_bias=True)
        self.embed = self.param(
            "embed",
            partitioned(nn.initializers.normal(0.02), (None, "embed")),
            (c.bits, c.encoder_width),
            self.run.param_dtype,
        )
        self.decoder = Decoder(c, self.run, self.tapped)

    def __call__(
        self, images: Float[Array, "B height width 3"]
    ) -> Float[Array, "B height width 3"]:
        """Reconstruct images through their hard code."""
        code = hard_code(self.encode(images))
        return self.decode(code, *images.shape[1:3])

    def encode(self, images: Float[Array, "B height width 3"]) -> Float[Array, "B N K"]:
        """Map images in [-1, 1] to the logits of their bits.

        Raises:
          UserError: if the sides are not multiples of the patch size times 2^downsamplings.
        """
        logits = self.to_bits(self.encoder(images.astype(self.run.dtype)))
        return logits.astype(self.run.output_dtype)

    def decode(
        self, code: Float[Array, "B N K"], height: int, width: int
    ) -> Float[Array, "B {height} {width} 3"]:
        """Map codes of 0 and 1 to images, about in [-1, 1].

        Any size may be asked for, whatever the size of the image that was encoded.

        Raises:
          UserError: if the sides are not multiples of the patch size times 2^upsamplings.
        """
        latent = jnp.dot(code.astype(self.run.dtype), self.embed.astype(self.run.dtype))
        return self.decoder(latent, height, width).astype(self.run.output_dtype)


def hard_code(logits: Float[Array, "B N K"]) -> Float[Array, "B N K"]:
    """Return the bits of the code at evaluation, 1[sigmoid(logit) > 0.5], as 0 and 1."""
    return (jax.nn.sigmoid(logits) > 0.5).astype(logits.dtype)


def sample_code(
    logits: Float[Array, "B N K"], key: Key[Array, ""], temperature: Scalar
) -> Float[Array, "B N K"]:
    """Sample the bits of the code in training, with straight-through gradients.

    Args:
      logits: of the bits.
      key: a random key.
      temperature: bits are Bernoulli(sigmoid(logits / temperature)); the gradient is that of
        sigmoid(logits).

    Returns:
      bits of 0 and 1.
    """
    soft = jax.nn.sigmoid(logits)
    sampled = jax.random.bernoulli(key, jax.nn.sigmoid(logits / temperature)).astype(logits.dtype)
    return sampled + soft - jax.lax.stop_gradient(soft)


def code_loss(logits: Float[Array, "B N K"]) -> Float[Array, ""]:
    """Return mean of p(1 - p), p = sigmoid(logits): small when every bit is sure of itself."""
    p = jax.nn.sigmoid(logits)
    return jnp.mean(p * (1.0 - p))
