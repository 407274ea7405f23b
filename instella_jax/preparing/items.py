"""What readers hand over: an image with its captions, or why it cannot be read, or what it is."""

from __future__ import annotations

import dataclasses
import posixpath
from collections.abc import Mapping
from typing import Any

# The usual names of columns, keys and features, in whatever case.
IMAGE_KEYS = (
    "image", "jpg", "jpeg", "png", "webp", "img", "picture", "photo", "image_bytes", "img_bytes",
    "image_data", "image_file", "gif", "bmp", "tif", "tiff", "avif", "bytes",
)  # fmt: skip


# The column of a watermark's score, in whatever case.
WATERMARK = "pwatermark"
# Larger files are refused unread: no picture that training would take is of this size.
MAX_BYTES = 256 * 2**20


# Reasons that several readers give.
NO_CAPTION, UNPAIRED = "no caption", "caption without a picture"


@dataclasses.dataclass(frozen=True)
class Item:
    """A picture as it is in the input: its name, its file's bytes, captions and other columns.

    `seen` names all columns, keys or files that there are, those without a use too.
    """

    name: str
    image: bytes | None
    texts: tuple[str, ...]
    meta: Mapping[str, Any]
    seen: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Problem:
    """Something that could not be read.

    Attributes:
      name: of it.
      reason: why, in a few words that are counted.
      of_file: whether it is a damaged file, of which nobody knows how many pictures it held, and
        not one picture.
      count: how many pictures it stands for.
    """

    name: str
    reason: str
    of_file: bool = False
    count: int = 1


@dataclasses.dataclass(frozen=True)
class NotRead:
    """A file of a kind that the reader does not read; see `kind_of` for the kind."""

    name: str
    kind: str


HIDDEN = "hidden"


def is_hidden(name: str) -> bool:
    """Return whether a path leads to or through something hidden, such as `._a.jpg` of macOS."""
    return any(part.startswith(".") and part not in (".", "..") for part in name.split("/"))


def kind_of(name: str) -> str:
    """Return the kind of a file that is not read: its suffix in lower case, or `HIDDEN`."""
    if is_hidden(name):
        return HIDDEN
    return posixpath.splitext(name)[1].lower() or "no suffix"
