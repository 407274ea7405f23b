"""What captions are, wherever they come from: tars, Parquet files, folders."""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from instella_jax.data.samples import BadSample

# The usual names of columns, keys and features, in whatever case.
CAPTION_KEYS = (
    "text", "texts", "txt", "caption", "captions", "top_caption", "all_captions", "prompt",
    "re_caption", "recaption", "re_captions", "recaptions", "short_caption", "long_caption",
    "alt_text",
)  # fmt: skip
MAX_CAPTIONS, MAX_CAPTION = 100, 10_000

# Reasons that are counted.
BROKEN_CAPTION, BROKEN_JSON = "broken caption", "broken JSON"

_BOM = "\ufeff"


def decode_text(data: bytes) -> str:
    """Return the text of bytes in UTF-8, with or without a byte order mark.

    Nothing else is guessed at: Latin-1, GBK and the like can be told apart only by what they say.

    Raises:
      BadSample: they are not UTF-8, or hold a NUL, as UTF-16 and binary files do.
    """
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadSample(f"not UTF-8 text ({error.reason} at byte {error.start})") from None
    return check_text(text)


def check_text(text: str) -> str:
    """Return a text without its byte order mark.

    Raises:
      BadSample: it holds a NUL.
    """
    if "\0" in text:
        raise BadSample("not text: it holds a NUL")
    return text.removeprefix(_BOM)


def caption_lines(data: bytes) -> list[str]:
    """Return the captions in a `.txt` or `.caption` file, one a line.

    Raises:
      BadSample: it is not text; its message is `BROKEN_CAPTION`.
    """
    try:
        return decode_text(data).splitlines()
    except BadSample:
        raise BadSample(BROKEN_CAPTION) from None


def named(names: Iterable[str], keys: Sequence[str]) -> list[str]:
    """Return those of the names that are among the keys, in the order of the keys.

    Case matters only where names differ in nothing else.
    """
    there = list(names)
    found = []
    for key in keys:
        alike = [name for name in there if name.casefold() == key.casefold()]
        found += [key] if key in alike else alike if len(alike) == 1 else []
    return list(dict.fromkeys(found))


def captions(values: Mapping[str, Any], keys: Sequence[str]) -> tuple[str, ...]:
    """Collect captions: of several keys, in lists or nested, each once and on one line.

    Raises:
      BadSample: one is not text, see `decode_text`; its message is `BROKEN_CAPTION`.
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
