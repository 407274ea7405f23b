"""How pictures are encoded and decoded, apart from the network.

Axes: T tiles.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np

from instella_jax.codec import tiles
from instella_jax.codec.format import LIMITS, MAX_PIXELS, BadCode, CodeFile
from instella_jax.data.buckets import Shape
from instella_jax.errors import UserError

if TYPE_CHECKING:
    from PIL import Image

    Picture = np.ndarray | Image.Image
else:
    Picture = object


def as_pixels(image: Picture) -> np.ndarray:
    """Return a picture as uint8 [h, w, 3].

    Raises:
      UserError: it is an array of another form.
    """
    if not isinstance(image, np.ndarray):
        image = np.asarray(image.convert("RGB"))
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3 or not image.size:
        raise UserError(
            f"the image is {image.dtype} {list(image.shape)}: expected uint8 [height, width, 3]"
        )
    return image


@dataclasses.dataclass(frozen=True)
class Encoding:
    """How a picture is encoded.

    Attributes:
      tile: side in pixels that tiles have, about, each with a code of its own; 0: one code for the
        whole picture.
      overlap: pixels by which a tile reaches into its neighbours, so that no seams are seen.
      tokens: how many of the N are stored, the first ones; 0: all. Fewer need a tokenizer that was
        trained for that.
      metadata: EXIF block to take along.
    """

    tile: int = 0
    overlap: int = 0
    tokens: int = 0
    metadata: bytes = b""

    def __post_init__(self) -> None:
        """Check ranges.

        Raises:
          UserError: a number is negative.
        """
        if self.tile < 0 or self.overlap < 0:
            raise UserError(
                f"tile and overlap must be at least 0, got {self.tile} and {self.overlap}"
            )

    def tiling(self, height: int, width: int) -> tuple[int, int, int]:
        """Return rows and columns of tiles of a picture, and their overlap."""
        if not self.tile:
            return 1, 1, 0
        rows, columns = (
            min(LIMITS["tile_rows"], max(1, round(side / self.tile))) for side in (height, width)
        )
        if rows * columns == 1:
            return 1, 1, 0
        return rows, columns, min(self.overlap, min(height // rows, width // columns) // 2)


@dataclasses.dataclass(frozen=True)
class Decoding:
    """How a picture is decoded.

    Attributes:
      size: height and width of the result in pixels, or its longer side; None: as the original.
      grid: height and width that the decoder draws each tile at, before it is resized; None: those
        of encoding, or with `size` the closest that was trained.
      tokens: how many are used, the first ones; 0: all that are stored.
    """

    size: Shape | int | None = None
    grid: Shape | None = None
    tokens: int = 0

    def __post_init__(self) -> None:
        """Check ranges.

        Raises:
          UserError: a size is not positive.
        """
        sides = (self.size,) if isinstance(self.size, int) else self.size or ()
        if any(side < 1 for side in sides):
            raise UserError(f"size must be at least 1 pixel, got {self.size}")

    def target(self, file: CodeFile) -> Shape:
        """Return height and width of the result.

        Raises:
          BadCode: it has too many pixels, or fewer than tiles.
        """
        height, width = file.height, file.width
        if isinstance(self.size, int):
            longer = max(height, width)
            height, width = (max(1, round(s * self.size / longer)) for s in (height, width))
        elif self.size:
            height, width = self.size
        if height * width > MAX_PIXELS:
            raise BadCode(f"{width}x{height} is over {MAX_PIXELS:,} pixels")
        if height < file.tile_rows or width < file.tile_columns:
            raise BadCode(
                f"{width}x{height} pixels are fewer than its {file.tile_columns}x"
                f"{file.tile_rows} tiles"
            )
        return height, width


def assemble(file: CodeFile, parts: np.ndarray, decoding: Decoding) -> np.ndarray:
    """Make the picture of decoded tiles, uint8 [T, h, w, 3]: uint8 [height, width, 3].

    Raises:
      BadCode: see `Decoding.target`.
    """
    height, width = decoding.target(file)
    rows, columns = file.tile_rows, file.tile_columns
    overlaps = (
        min(round(file.overlap * height / file.height), height // rows // 2),
        min(round(file.overlap * width / file.width), width // columns // 2),
    )
    return tiles.join(parts, rows, columns, overlaps, height, width)
