"""Sizes of the tokenizer, and where its tokens stand.

The mathematics: "Tokenizer" in docs/model.md.
"""

import dataclasses
import math

import numpy as np
from jaxtyping import Float32

from instella_jax.errors import UserError


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
