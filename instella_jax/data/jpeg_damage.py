"""Tell a JPEG file whose blocks are damaged, which Pillow reads without a word.

libjpeg goes on past what it cannot make sense of and only warns; simplejpeg, of the extra `jpeg`,
raises these warnings. A flipped bit often leaves bits that make sense, which nothing can tell.
"""

from __future__ import annotations

import functools
import re
from types import ModuleType

from instella_jax.data import jpeg_ends

START = b"\xff\xd8"
DAMAGED = "damaged JPEG"
NOT_CHECKED = "JPEG not checked for damaged blocks, which needs instella-jax[jpeg]"
_DAMAGE = re.compile(r"Corrupt JPEG data|Premature end|Invalid JPEG file structure")
_BEFORE_END = re.compile(r"Corrupt JPEG data: (\d+) extraneous bytes before marker 0xd9")


def can_check() -> bool:
    """Return whether simplejpeg is installed."""
    return _library() is not None


def is_damaged(data: bytes) -> bool:
    """Return whether blocks of a JPEG file are damaged; decodes them all, once, at an eighth.

    A file that lacks only its end marker is not damaged, nor is one with padding before it, as
    cameras write. False too where `can_check` is false.
    """
    library = _library()
    if library is None:
        return False
    end = jpeg_ends.end_of(data)
    if end is None:
        data, end = data + jpeg_ends.END, len(data)
    try:
        colours = library.decode_jpeg_header(data, strict=False)[2]
        library.decode_jpeg(
            data, "CMYK" if colours in ("CMYK", "YCCK") else "GRAY",
            min_height=1, min_width=1, min_factor=8,
        )  # fmt: skip
    except ValueError as error:
        padding = _BEFORE_END.search(str(error))
        if padding and len(set(data[end - int(padding[1]) : end])) == 1:
            return False
        return _DAMAGE.search(str(error)) is not None
    return False


@functools.cache
def _library() -> ModuleType | None:
    try:
        import simplejpeg
    except ImportError:
        return None
    return simplejpeg
