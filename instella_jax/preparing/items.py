"""What readers hand over: an image with its captions, or why it cannot be read."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

IMAGE_KEYS = ("image", "jpg", "jpeg", "png", "webp", "img")


CAPTION_KEYS = ("text", "texts", "caption", "captions", "top_caption", "all_captions", "prompt")


MAX_CAPTIONS, MAX_CAPTION = 100, 10_000


# Larger files are refused unread: no picture that training would take is of this size.
MAX_BYTES = 256 * 2**20


@dataclasses.dataclass(frozen=True)
class Item:
    """A picture as it is in the input: its name, its file's bytes, captions and other columns."""

    name: str
    image: bytes | None
    texts: tuple[str, ...]
    meta: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Problem:
    """Something that could not be read.

    Attributes:
      name: of it.
      reason: why, in a few words that are counted.
      of_file: whether it is a damaged file, of which nobody knows how many pictures it held, and
        not one picture.
    """

    name: str
    reason: str
    of_file: bool = False


def captions(values: Mapping[str, Any], keys: Sequence[str]) -> tuple[str, ...]:
    """Collect captions: of several keys, in lists or nested, each once and on one line."""
    found: dict[str, None] = {}

    def add(value: Any) -> None:
        if isinstance(value, bytes):
            value = value.decode("utf-8", "replace")
        elif hasattr(value, "tolist"):
            value = value.tolist()
        if isinstance(value, str):
            # Half of a surrogate pair, which JSON can spell, cannot be written again.
            text = " ".join(value.encode("utf-8", "replace").decode().split())[:MAX_CAPTION]
            if text and len(found) < MAX_CAPTIONS:
                found[text] = None
        elif isinstance(value, Mapping):
            for key in keys:
                add(value.get(key))
        elif isinstance(value, list | tuple):
            for entry in value:
                add(entry)

    add(values)
    return tuple(found)


def label_caption(name: str) -> str:
    """Return the caption of a picture of which only the class is known."""
    return f"A photo of {' '.join(name.replace('_', ' ').split())}"
