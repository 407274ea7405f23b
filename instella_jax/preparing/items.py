"""What readers hand over: an image with its captions, or why it cannot be read, or what it is."""

from __future__ import annotations

import dataclasses
import json
import posixpath
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from instella_jax.data.captions import check_text, decode_text
from instella_jax.data.samples import BadSample

# The usual names of columns, keys and features, in whatever case.
IMAGE_KEYS = (
    "image", "jpg", "jpeg", "png", "webp", "img", "picture", "photo", "image_bytes", "img_bytes",
    "image_data", "image_file", "gif", "bmp", "tif", "tiff", "avif", "bytes",
)  # fmt: skip
CAPTION_KEYS = (
    "text", "texts", "txt", "caption", "captions", "top_caption", "all_captions", "prompt",
    "re_caption", "recaption", "re_captions", "recaptions", "short_caption", "long_caption",
    "alt_text",
)  # fmt: skip


MAX_CAPTIONS, MAX_CAPTION = 100, 10_000


# Larger files are refused unread: no picture that training would take is of this size.
MAX_BYTES = 256 * 2**20


# Reasons that several readers give.
BROKEN_CAPTION, BROKEN_JSON = "broken caption", "broken JSON"
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


def named(names: Iterable[str], keys: Sequence[str]) -> list[str]:
    """Return which of some names are the given keys, in the order of the keys.

    Case matters only where names differ in nothing else.
    """
    there = list(names)
    found = []
    for key in keys:
        alike = [name for name in there if name.casefold() == key.casefold()]
        found += [key] if key in alike else alike if len(alike) == 1 else []
    return list(dict.fromkeys(found))


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


def printable(name: str) -> str:
    r"""Return a file name that can be printed and stored: a byte that is not UTF-8 as `\xff`."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def captions(values: Mapping[str, Any], keys: Sequence[str]) -> tuple[str, ...]:
    """Collect captions: of several keys, in lists or nested, each once and on one line.

    Raises:
      BadSample: one is not text, see `data.captions.decode_text`; its message is `BROKEN_CAPTION`.
    """
    found: dict[str, None] = {}

    def add(value: Any) -> None:
        if isinstance(value, bytes):
            value = decode_text(value)
        elif hasattr(value, "tolist"):
            value = value.tolist()
        if isinstance(value, str):
            value = check_text(value)
            # Half of a surrogate pair, which JSON can spell, cannot be written again.
            text = " ".join(value.encode("utf-8", "replace").decode().split())[:MAX_CAPTION]
            if text and len(found) < MAX_CAPTIONS:
                found[text] = None
        elif isinstance(value, Mapping):
            for name in named(map(str, value), keys):
                add(value.get(name))
        elif isinstance(value, list | tuple):
            for entry in value:
                add(entry)

    try:
        add(values)
    except BadSample:
        raise BadSample(BROKEN_CAPTION) from None
    return tuple(found)


def read_json(data: bytes) -> dict[str, Any]:
    """Return the object in a JSON file, {} where it holds something else.

    Raises:
      BadSample: it cannot be read; its message is `BROKEN_CAPTION` or `BROKEN_JSON`.
    """
    try:
        text = decode_text(data)
    except BadSample:
        raise BadSample(BROKEN_CAPTION) from None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        raise BadSample(BROKEN_JSON) from None
    return value if isinstance(value, dict) else {}


def label_caption(name: str) -> str:
    """Return the caption of a picture of which only the class is known."""
    return f"A photo of {' '.join(name.replace('_', ' ').split())}"
