"""Paths as users write them."""

import os
from pathlib import Path


def expand(paths: str) -> str:
    """Replace a leading `~` of each of several paths with commas between them."""
    return ",".join(_expand_one(part) for part in paths.split(","))


def path_argument(text: str) -> Path:
    """Return the path that an argument of a command names; `~` is the user's folder."""
    return Path(os.path.expanduser(text))


def _expand_one(part: str) -> str:
    bare = part.lstrip()
    return part[: len(part) - len(bare)] + os.path.expanduser(bare)
