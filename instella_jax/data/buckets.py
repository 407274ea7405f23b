"""Buckets: pictures of many sizes sorted into a few shapes, so that each batch has one.

`data.buckets` lists shapes, "HEIGHTxWIDTH" with commas between them: several aspect ratios at
about one area, several resolutions, or both.

The rule: a picture goes to the bucket of the closest aspect ratio, among the buckets that it covers
without being enlarged. Of equally close ones it takes the largest. A picture that covers none goes
to the closest of all, and of equally close ones to the smallest, where it is enlarged least. What
is equal in this too goes to the bucket that is listed first. A bucket with fewer pictures than one
batch is left out, and its pictures go where the same rule puts them among the others.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import re
from collections.abc import Sequence

import numpy as np

from instella_jax.config import Config
from instella_jax.errors import UserError

logger = logging.getLogger(__name__)

# Height and width in pixels.
Shape = tuple[int, int]

KINDS = ("folder", "shards")
_MOST = 64
_CHUNK = 1 << 16


@functools.cache
def parse_shapes(text: str) -> tuple[Shape, ...]:
    """Read "512x512,384x640" as ((512, 512), (384, 640)), and "" as ().

    Raises:
      UserError: it is written in another way, or a shape comes twice.
    """
    if not text.strip():
        return ()
    found = [re.fullmatch(r"\s*([1-9]\d{0,4})x([1-9]\d{0,4})\s*", part) for part in text.split(",")]
    shapes = [(int(match[1]), int(match[2])) for match in found if match]
    if len(shapes) < len(found) or len(set(shapes)) < len(shapes) or len(shapes) > _MOST:
        raise UserError(
            f"data.buckets is {text!r}: expected HEIGHTxWIDTH in pixels, each once, at most {_MOST}"
            ", with commas between them, for example 512x512,384x640,640x384"
        )
    return tuple(shapes)


def shapes(config: Config) -> tuple[Shape, ...]:
    """Return the shapes that training batches of a config may have, the largest first.

    Args:
      config: of any stage, as a whole.

    Raises:
      UserError: data.buckets is not readable, or the stage or the kind of data has none.
    """
    check_config(config.data, tokenizer=config.stage == "tokenizer")
    side = config.data.image_size
    found = parse_shapes(config.data.buckets) or ((side, side),)
    return tuple(sorted(found, key=lambda shape: -shape[0] * shape[1]))


def check_config(config: Config, *, tokenizer: bool) -> None:
    """Check that buckets are asked for where there can be any.

    Args:
      config: the `data` section.
      tokenizer: whether it is the tokenizer that is trained.

    Raises:
      UserError: they are asked for elsewhere.
    """
    if not config.buckets:
        return
    if not tokenizer:
        raise UserError(
            "data.buckets is for the tokenizer: a generator trains at data.image_size alone, so "
            "leave data.buckets empty"
        )
    if config.kind not in KINDS:
        raise UserError(
            f"data.buckets needs pictures of many sizes, but data.kind is {config.kind!r}: use "
            f"{' or '.join(repr(kind) for kind in KINDS)}, or leave data.buckets empty"
        )


def assign(sizes: np.ndarray, shapes: Sequence[Shape]) -> np.ndarray:
    """Sort pictures into buckets by the rule of this module.

    Args:
      sizes: width and height in pixels, int [n, 2]; 0 where they are not known.
      shapes: of the buckets.

    Returns:
      Numbers of buckets, int8 [n]; -1 where the size is not known.
    """
    areas = [height * width for height, width in shapes]
    height, width = np.array(shapes, np.int64).T
    # Sorting is stable: the first of the equal ones is the one listed first.
    falling, rising = (np.argsort(np.multiply(areas, sign), kind="stable") for sign in (-1, 1))
    result = np.empty(len(sizes), np.int8)
    for start in range(0, len(sizes), _CHUNK):
        columns, rows = np.asarray(sizes[start : start + _CHUNK], np.int64).T[..., None]
        # Products are exact and a quotient is rounded once, so that equal ratios are equal numbers
        # on every machine.
        one, other = columns * height, rows * width
        distance = np.maximum(one, other) / np.maximum(np.minimum(one, other), 1)
        covered = (columns >= width) & (rows >= height)
        distance_covered = np.where(covered, distance, np.inf)
        largest = falling[np.argmin(distance_covered[:, falling], axis=1)]
        smallest = rising[np.argmin(distance[:, rising], axis=1)]
        chosen = np.where(covered.any(axis=1), largest, smallest)
        known = (columns > 0) & (rows > 0)
        result[start : start + _CHUNK] = np.where(known[:, 0], chosen, -1)
    return result


def sort(sizes: np.ndarray, shapes: Sequence[Shape], least: int) -> np.ndarray:
    """Assign pictures to buckets, and those of buckets with fewer than `least` to the others.

    Args:
      sizes: see `assign`.
      shapes: see `assign`.
      least: pictures that a bucket needs.

    Returns:
      Numbers of buckets, int8 [n]; see `assign`.
    """
    chosen = assign(sizes, shapes)
    left = list(range(len(shapes)))
    while len(left) > 1:
        counts = [int(np.count_nonzero(chosen == number)) for number in left]
        fewest = int(np.argmin(counts))
        if counts[fewest] >= least:
            break
        dropped = left.pop(fewest)
        if counts[fewest]:
            logger.warning(
                "the bucket %dx%d has %d picture(s), fewer than one batch of %d: they go to others",
                *shapes[dropped],
                counts[fewest],
                least,
            )
            (moved,) = np.nonzero(chosen == dropped)
            others = assign(sizes[moved], [shapes[number] for number in left])
            chosen[moved] = np.array(left, np.int8)[others]
    return chosen


@dataclasses.dataclass(frozen=True, repr=False)
class Subset:
    """Some samples of a source.

    Attributes:
      source: that they are of.
      numbers: their numbers there, [n].
    """

    source: object
    numbers: np.ndarray

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> dict:
        return self.source[int(self.numbers[index])]  # pyright: ignore[reportIndexIssue]

    def __repr__(self) -> str:
        """Name the source and the size; grain stores this to recognise the source."""
        return f"Subset({self.source!r}, {len(self)})"
