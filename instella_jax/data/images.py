"""Picture files: which are accepted, and how they are decoded.

Folders, tars, parquet files and shards all read pictures here, so that a file is accepted by one of
them if it is accepted by all.
"""

from __future__ import annotations

import math
import os
from typing import IO, TYPE_CHECKING

import numpy as np

from instella_jax.data.samples import BadSample

if TYPE_CHECKING:
    from PIL import Image

# Names of files that are taken for pictures, in lower case.
SUFFIXES = (
    ".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".avif",
    ".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx",
    ".gif", ".bmp", ".dib", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".pfm", ".qoi",
)  # fmt: skip
# What Pillow may take a file for, whatever its name says: no format that runs another program or
# has no mark to know it by.
FORMATS = (
    "PNG", "JPEG", "WEBP", "AVIF", "JPEG2000", "GIF", "BMP", "DIB", "TIFF", "PPM", "QOI",
)  # fmt: skip
_SWAPPED = (5, 6, 7, 8)  # EXIF orientations that lay the picture on its side
_ORIENTATION = 0x0112


def is_picture(name: str) -> bool:
    """Return whether a file of this name is taken for a picture, by its suffix alone."""
    return name.lower().endswith(SUFFIXES)


def shown_size(image: Image.Image) -> tuple[int, int]:
    """Return width and height of an open picture once it is turned upright; decodes nothing."""
    from PIL import Image

    width, height = image.size
    # That of PNG would decode the picture, for an entry that may come after it.
    turned = Image.Image.getexif(image).get(_ORIENTATION) in _SWAPPED
    return (height, width) if turned else (width, height)


def read_picture(
    path: str | os.PathLike[str], *, decode_side: int | None = None, max_pixels: int | None = None
) -> np.ndarray:
    """Read any picture as a person sees it: turned upright, transparency on white, in RGB.

    Args:
      path: The file. Of an animation, the first picture is taken.
      decode_side: Large JPEGs may be decoded at a fraction of their size, as long as neither side
        falls below this many pixels: several times faster. None: at full size.
      max_pixels: Larger pictures are refused unread. Default: Pillow's limit, 89 million.

    Returns:
      uint8 [h, w, 3].

    Raises:
      BadSample: the file is missing, broken, cut short, too large, or not a picture.
    """
    return decode_picture(path, str(path), decode_side=decode_side, max_pixels=max_pixels)


def decode_picture(
    file: str | os.PathLike[str] | IO[bytes],
    name: str,
    *,
    decode_side: int | None = None,
    max_pixels: int | None = None,
) -> np.ndarray:
    """Read a picture as `read_picture` does, from a path or an open file called `name`."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    limit = max_pixels or Image.MAX_IMAGE_PIXELS or math.inf
    try:
        with Image.open(file, formats=FORMATS) as image:
            if image.width * image.height > limit:
                raise BadSample(
                    f"{name} is refused: {image.width}x{image.height} is over {limit} pixels"
                )
            if decode_side is not None:
                image.draft(None, (decode_side, decode_side))
            image.load()
            return _to_rgb(ImageOps.exif_transpose(image))
    except BadSample:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadSample(f"{name} is refused: {error}") from None
    except UnidentifiedImageError:
        raise BadSample(f"{name} cannot be read: not a picture of a known format") from None
    except Exception as error:  # Pillow's decoders raise all kinds on broken files
        raise BadSample(f"{name} cannot be read: {error or type(error).__name__}") from None


def _to_rgb(image: Image.Image) -> np.ndarray:
    """Return uint8 [h, w, 3], whatever the mode."""
    from PIL import Image

    if image.mode.startswith("I") or image.mode == "F":
        grey = np.asarray(image)
        top = 1.0 if image.mode == "F" else 65535
        if not (grey.min() >= 0 and grey.max() <= top):
            raise ValueError(f"values outside [0, {top}] in a picture of mode {image.mode}")
        # Pillow's own conversion would clip 16-bit values at 255.
        return np.repeat(np.round(grey[..., None] * (255 / top)).astype(np.uint8), 3, axis=-1)
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, layer)
    return np.asarray(image.convert("RGB"))
