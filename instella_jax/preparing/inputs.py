"""Names of the inputs of `data import`: several of them, and patterns as webdataset has them."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from instella_jax.errors import UserError

_INNERMOST = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(-?\d+)\.\.(-?\d+)")
_MOST = 1_000_000


def expand(names: Sequence[str | os.PathLike[str]]) -> list[Path]:
    """Return the paths that names stand for, each once and in their order.

    A name of something that exists stands for it. Another one may be several with commas or `::`
    between them, and hold numbers or alternatives in braces: `shards-{000..012}.tar`, `{a,b}.tar`.

    Raises:
      UserError: there are none, or a pattern stands for more than a million.
    """
    paths: dict[Path, None] = {}
    for name in names:
        whole = Path(name).expanduser()
        if whole.exists():
            paths[whole] = None
            continue
        for part in _names(os.fspath(name)):
            paths.update((Path(text).expanduser(), None) for text in _alternatives(part))
    if not paths:
        raise UserError("no input is named; give the files or folders to import")
    return list(paths)


def _names(text: str) -> list[str]:
    """Return the names between commas outside of braces, and `::`, which webdataset has there."""
    names, depth = [""], 0
    for letter in text.replace("::", ","):
        depth += (letter == "{") - (letter == "}")
        if letter == "," and depth <= 0:
            names.append("")
        else:
            names[-1] += letter
    return [name for name in names if name]


def _alternatives(pattern: str) -> list[str]:
    texts = list(itertools.islice(_expanded(pattern), _MOST + 1))
    if len(texts) > _MOST:
        raise UserError(f"{pattern} stands for over {_MOST} files; give a folder in its place")
    return list(dict.fromkeys(texts))


def _expanded(pattern: str) -> Iterator[str]:
    """Yield what a pattern stands for; where braces are in braces, some of it several times."""
    for braces in _INNERMOST.finditer(pattern):
        inner = braces[1]
        if numbers := _RANGE.fullmatch(inner):
            choices = _numbers(numbers[1], numbers[2])
        elif "," in inner:
            choices = iter(inner.split(","))
        else:
            continue
        for choice in choices:
            yield from _expanded(pattern[: braces.start()] + choice + pattern[braces.end() :])
        return
    yield pattern


def _numbers(first: str, last: str) -> Iterator[str]:
    """Yield the numbers from one to another, as wide as they are if one has a leading zero."""
    start, stop = int(first), int(last)
    padded = any(len(text.lstrip("-")) > 1 and text.lstrip("-")[0] == "0" for text in (first, last))
    width = max(len(first), len(last)) if padded else 0
    step = 1 if stop >= start else -1
    return (f"{number:0{width}d}" for number in range(start, stop + step, step))
