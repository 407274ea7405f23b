"""Picture files: which are accepted, and how they are decoded.

Folders, tars, parquet files and shards all read pictures here, so that a file is accepted by one of
them if it is accepted by all.
"""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import math
import mimetypes
import os
import warnings
from collections.abc import Callable, Iterator
from typing import IO, TYPE_CHECKING

import numpy as np

from instella_jax.data import jpeg_ends
from instella_jax.data.colour_profiles import BrokenProfile, to_srgb
from instella_jax.data.samples import BadSample
from instella_jax.runtime.files import printable

if TYPE_CHECKING:
    from PIL import Image

logger = logging.getLogger(__name__)

# Names of files that are taken for pictures, in lower case.
SUFFIXES = (
    ".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".avif", ".heic", ".heif", ".hif",
    ".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx",
    ".gif", ".bmp", ".dib", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".pfm", ".qoi",
)  # fmt: skip
# What Pillow may take a file for, whatever its name says: no format that runs another program or
# has no mark to know it by.
FORMATS = (
    "PNG", "JPEG", "WEBP", "AVIF", "JPEG2000", "GIF", "BMP", "DIB", "TIFF", "PPM", "QOI",
)  # fmt: skip
# Pictures that are not read, beside those that have a media type of pictures.
_OTHER_SUFFIXES = (
    ".ai", ".arw", ".cr2", ".cr3", ".dng", ".dds", ".eps", ".exr", ".hdr", ".icns", ".ico", ".jxl",
    ".nef", ".orf", ".pcx", ".pef", ".psd", ".raf", ".rw2", ".sgi", ".svg", ".tga", ".wmf", ".xcf",
)  # fmt: skip
_HEIF_BRANDS = (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1")
_ORIENTATION = 0x0112
# What turns a picture upright, by its EXIF orientation.
_TURNS = {
    2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE", 6: "ROTATE_270", 7: "TRANSVERSE", 8: "ROTATE_90",
}  # fmt: skip
_SWAPPED = (5, 6, 7, 8)  # those that lay the picture on its side
TOO_LARGE = "too many pixels"
BROKEN_PROFILE = "broken colour profile"


class BadPicture(BadSample):
    """Raised for a picture that cannot be read.

    Attributes:
      reason: why, in a few words that are counted.
    """

    def __init__(self, message: str, reason: str = "broken picture"):
        super().__init__(message)
        self.reason = reason


def is_picture(name: str) -> bool:
    """Return whether a file of this name is taken for a picture, by its suffix alone."""
    return name.lower().endswith(SUFFIXES)


def is_other_picture(name: str) -> bool:
    """Return whether a file of this name is a picture of a kind that is not read."""
    kind = mimetypes.guess_type(name.lower())[0] or ""
    return not is_picture(name) and (
        kind.startswith("image/") or name.lower().endswith(_OTHER_SUFFIXES)
    )


def read_size(file: str | os.PathLike[str] | IO[bytes], name: str) -> tuple[int, int]:
    """Return width and height of a picture as it is shown, from its header alone.

    Args:
      file: path of the file, or the file opened.
      name: what it is called in messages.

    Raises:
      BadPicture: it cannot be read.
    """
    with open_picture(file, name) as image:
        return shown_size(image)


@contextlib.contextmanager
def open_picture(file: str | os.PathLike[str] | IO[bytes], name: str) -> Iterator[Image.Image]:
    """Open a picture for what its header says; nothing is decoded.

    Raises:
      BadPicture: it cannot be read.
    """
    with _refusals(name), _opened(file) as content, _open(content, name) as image:
        yield image


def shown_size(image: Image.Image) -> tuple[int, int]:
    """Return width and height of an open picture once it is turned upright; decodes nothing."""
    width, height = image.size
    return (height, width) if _orientation(image) in _SWAPPED else (width, height)


def read_picture(
    path: str | os.PathLike[str], *, decode_side: int | None = None, max_pixels: int | None = None
) -> np.ndarray:
    """Read any picture as a person sees it: turned upright, transparency on white, in sRGB.

    Args:
      path: The file. Of an animation, the first picture is taken.
      decode_side: Large JPEGs may be decoded at a fraction of their size, as long as neither side
        falls below this many pixels: several times faster. None: at full size.
      max_pixels: Larger pictures are refused unread. Default: Pillow's limit, 89 million.

    Returns:
      uint8 [h, w, 3].

    Raises:
      BadPicture: the file is missing, broken, cut short, too large, or not a picture.
    """
    return decode_picture(path, printable(path), decode_side=decode_side, max_pixels=max_pixels)


@functools.cache
def log_flaw(flaw: str) -> None:
    """Log a flaw of pictures that are read all the same, each kind once."""
    logger.warning("pictures with a %s are kept as they are", flaw)


def decode_picture(
    file: str | os.PathLike[str] | IO[bytes],
    name: str,
    *,
    decode_side: int | None = None,
    max_pixels: int | None = None,
    on_flaw: Callable[[str], None] = log_flaw,
) -> np.ndarray:
    """Read a picture as `read_picture` does, from a path or an open file called `name`.

    `on_flaw` is given what is wrong with a picture that can be read; default: logged once.
    """
    with _refusals(name), _opened(file) as content:
        return _decode(content, name, decode_side, max_pixels, on_flaw)


@contextlib.contextmanager
def _refusals(name: str) -> Iterator[None]:
    """Raise whatever Pillow raises as `BadPicture`."""
    from PIL import Image, UnidentifiedImageError

    try:
        yield
    except BadPicture:
        raise
    except Image.DecompressionBombError as error:
        raise BadPicture(f"{name} is refused: {error}", TOO_LARGE) from None
    except UnidentifiedImageError:
        raise BadPicture(f"{name} cannot be read: not a picture of a known format") from None
    except Exception as error:  # Pillow's decoders raise all kinds on broken files
        raise BadPicture(f"{name} cannot be read: {error or type(error).__name__}") from None


def _opened(
    file: str | os.PathLike[str] | IO[bytes],
) -> contextlib.AbstractContextManager[IO[bytes]]:
    """Open a path; a file that is open already stays so."""
    if isinstance(file, str | os.PathLike):
        return open(file, "rb")
    return contextlib.nullcontext(file)


@functools.cache
def _formats() -> tuple[str, ...]:
    """Return what Pillow may take a file for, HEIF among it where pillow-heif is installed."""
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        return FORMATS
    register_heif_opener()
    return (*FORMATS, "HEIF")


def _open(file: IO[bytes], name: str) -> Image.Image:
    from PIL import Image, UnidentifiedImageError

    # What Pillow warns of (large pictures, damaged EXIF) is refused or does not matter here.
    # `warnings.catch_warnings` would not do: it is not safe in threads.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    formats = _formats()
    try:
        return Image.open(file, formats=formats)
    except UnidentifiedImageError:
        file.seek(0)
        start = file.read(12)
        if "HEIF" not in formats and start[4:8] == b"ftyp" and start[8:12] in _HEIF_BRANDS:
            raise BadPicture(
                f"{name} cannot be read: HEIF needs pillow-heif; "
                "install it by pip install 'instella-jax[heif]'",
                "HEIF, which needs instella-jax[heif]",
            ) from None
        raise


def _orientation(image: Image.Image) -> int:
    """Return how an open picture is to be turned, by its EXIF or XMP entry, 1 for not at all."""
    from PIL import Image

    if image.format == "TIFF":  # Pillow turns these itself, and gives their size as it is then.
        return 1
    try:
        # That of PNG would decode the picture, for an entry that may come after it.
        return Image.Image.getexif(image).get(_ORIENTATION, 1)
    except Exception:  # damaged entries make Pillow raise all kinds
        return 1


def _decode(
    file: IO[bytes],
    name: str,
    decode_side: int | None,
    max_pixels: int | None,
    on_flaw: Callable[[str], None],
) -> np.ndarray:
    from PIL import Image

    limit = max_pixels or Image.MAX_IMAGE_PIXELS or math.inf
    with _open(file, name) as image:
        if image.width * image.height > limit:
            message = f"{name} is refused: {image.width}x{image.height} is over {limit} pixels"
            raise BadPicture(message, TOO_LARGE)
        orientation = _orientation(image)
        if decode_side is not None:
            image.draft(None, (decode_side, decode_side))
        jpeg = image.format in ("JPEG", "MPO")
        try:
            image.load()
        except OSError:
            if not jpeg:
                raise
            ended = False
        else:
            ended = not jpeg or _has_end(file)
        if not ended:
            whole = jpeg_ends.with_end(_content(file))
            if whole is None:
                raise OSError("blocks are missing")
            return _decode(io.BytesIO(whole), name, decode_side, max_pixels, on_flaw)
        turn = _TURNS.get(orientation)
        turned = image.transpose(Image.Transpose[turn]) if turn else image
        return _to_rgb(turned, image.info.get("icc_profile"), on_flaw)


def _content(file: IO[bytes]) -> bytes:
    file.seek(0)
    return file.read()


def _has_end(file: IO[bytes]) -> bool:
    """Return whether a JPEG file has its end marker; most end with it."""
    file.seek(-2, os.SEEK_END)
    return file.read() == jpeg_ends.END or jpeg_ends.end_of(_content(file)) is not None


def _to_rgb(
    image: Image.Image, profile: bytes | None, on_flaw: Callable[[str], None]
) -> np.ndarray:
    """Return uint8 [h, w, 3] in sRGB, whatever the mode."""
    from PIL import Image

    alpha = None
    if image.mode.startswith("I") or image.mode == "F":
        image = _in_eight_bits(image)
    elif image.has_transparency_data:
        alpha = image.convert("RGBA").getchannel("A")
    if image.mode != "CMYK":
        image = image.convert("L" if image.mode in ("1", "L", "LA", "La") else "RGB")
    if profile:
        try:
            image = to_srgb(image, profile)
        except BrokenProfile:
            on_flaw(BROKEN_PROFILE)
    if alpha is not None:
        layer = image.convert("RGB")
        layer.putalpha(alpha)
        white = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, layer)
    return np.asarray(image.convert("RGB"))


def _in_eight_bits(image: Image.Image) -> Image.Image:
    """Scale 16 bits or [0, 1] to 8 bits; Pillow's own conversion would clip them at 255."""
    from PIL import Image

    grey = np.asarray(image)
    top = 1.0 if image.mode == "F" else 65535
    if not (grey.min() >= 0 and grey.max() <= top):
        raise ValueError(f"values outside [0, {top}] in a picture of mode {image.mode}")
    return Image.fromarray(np.round(grey * (255 / top)).astype(np.uint8))
