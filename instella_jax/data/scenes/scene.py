"""The facts of a scene, and the random numbers they are sampled with.

A scene is a plain background with one to three sprites that do not overlap. Everything is counted
in fractions of the picture's side, so that the same facts can be drawn at any size.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")
MASK = (1 << 64) - 1
# The snapped grid: positions are multiples of 1/8, sprites 3 or 4 of them wide.
GRID = 8
SMALL, LARGE = 3, 4


@dataclass(frozen=True)
class Placed:
    """A sprite in a scene; `left`, `top` and `side` are fractions of the picture's side."""

    name: str
    left: float
    top: float
    side: float

    @property
    def x(self) -> float:
        """The centre's distance from the left edge, in [0, 1]."""
        return self.left + self.side / 2

    @property
    def y(self) -> float:
        """The centre's distance from the top edge, in [0, 1]."""
        return self.top + self.side / 2

    @property
    def place(self) -> tuple[str, str]:
        """("top" | "middle" | "bottom", "left" | "middle" | "right"): the cell of the centre."""
        row = "top" if self.y < 0.375 else "bottom" if self.y > 0.625 else "middle"
        column = "left" if self.x < 0.375 else "right" if self.x > 0.625 else "middle"
        return row, column

    @property
    def large(self) -> bool:
        """Whether it is of the larger of the two sizes."""
        return self.side > (SMALL + LARGE) / 2 / GRID


@dataclass(frozen=True)
class Scene:
    """The facts of one picture: what `draw` paints and what captions may say."""

    background: str
    style: str
    objects: tuple[Placed, ...]

    @property
    def counts(self) -> dict[str, int]:
        """How many of each object, in the order of `objects`."""
        counts: dict[str, int] = {}
        for placed in self.objects:
            counts[placed.name] = counts.get(placed.name, 0) + 1
        return counts


class Stream:
    """Random numbers by splitmix64: the same on every machine, and cheap to start."""

    def __init__(self, *words: int | str):
        """Start a stream that depends on all words, in this order."""
        self.state = 0
        for word in words:
            number = zlib.crc32(word.encode()) if isinstance(word, str) else word
            self.state = (self.state ^ number) & MASK
            self.state = self.bits()

    def bits(self) -> int:
        """Return 64 random bits."""
        self.state = (self.state + 0x9E3779B97F4A7C15) & MASK
        z = self.state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
        return z ^ (z >> 31)

    def below(self, n: int) -> int:
        """Return an integer in [0, n)."""
        return (self.bits() * n) >> 64

    def choice(self, items: Sequence[T]) -> T:
        """Return one of the items, all equally likely."""
        return items[self.below(len(items))]

    def chance(self, percent: int) -> bool:
        """Return True in that many of a hundred cases."""
        return self.below(100) < percent


def relation(a: Placed, b: Placed) -> str | None:
    """Return where a lies from b, by the larger distance of the centres; None where neither is
    larger."""
    dx, dy = b.x - a.x, b.y - a.y
    if abs(dx) == abs(dy):
        return None
    if abs(dx) > abs(dy):
        return "left of" if dx > 0 else "right of"
    return "above" if dy > 0 else "below"
