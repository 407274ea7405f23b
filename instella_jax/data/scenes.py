"""The facts of a scene, and how they are drawn at random.

A scene is a plain background with one to three sprites that do not overlap. Everything is counted
in fractions of the picture's side, so that the same facts can be drawn at any size.

Some combinations are held out (see `heldout_background`, `heldout_count`, `heldout_relation`): no
training scene contains one, every held-out scene contains at least one, and each of their parts is
still seen in training.
"""

import functools
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from instella_jax.data.sprites import BACKGROUNDS, catalogue

T = TypeVar("T")
MASK = (1 << 64) - 1
# The snapped grid: positions are multiples of 1/8, sprites 3 or 4 of them wide.
GRID = 8
SMALL, LARGE = 3, 4
RELATIONS = ("left of", "right of", "above", "below")
CONVERSE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
# How n objects repeat: all equally likely.
_REPEATS = {
    1: ((1,),),
    2: ((2,), (1, 1), (1, 1)),
    3: ((3,), (2, 1), (1, 2), (1, 1, 1), (1, 1, 1)),
}
_HELDOUT_KINDS = ("background", "count", "relation")


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
    """Random draws by splitmix64: the same on every machine, and cheap to start."""

    def __init__(self, *words: int | str):
        self.state = 0
        for word in words:
            number = zlib.crc32(word.encode()) if isinstance(word, str) else word
            self.state = (self.state ^ number) & MASK
            self.state = self.bits()

    def bits(self) -> int:
        """64 random bits."""
        self.state = (self.state + 0x9E3779B97F4A7C15) & MASK
        z = self.state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
        return z ^ (z >> 31)

    def below(self, n: int) -> int:
        """An integer in [0, n)."""
        return (self.bits() * n) >> 64

    def choice(self, items: Sequence[T]) -> T:
        """One of the items, all equally likely."""
        return items[self.below(len(items))]

    def chance(self, percent: int) -> bool:
        """True in that many of a hundred cases."""
        return self.below(100) < percent


def relation(a: Placed, b: Placed) -> str | None:
    """Where a lies from b, by the larger distance of the centres; None where neither is larger."""
    dx, dy = b.x - a.x, b.y - a.y
    if abs(dx) == abs(dy):
        return None
    if abs(dx) > abs(dy):
        return "left of" if dx > 0 else "right of"
    return "above" if dy > 0 else "below"


def _holds(a: Placed, word: str, b: Placed) -> bool:
    """Whether the relation is true in the widest sense: any distance along its axis."""
    distance = {"left of": b.x - a.x, "right of": a.x - b.x, "above": b.y - a.y, "below": a.y - b.y}
    return distance[word] > 0


def _draw_of(*words: str) -> int:
    # The salt was chosen so that the prompts of the README are not held out.
    return Stream("held out", *words).below(1 << 20)


@functools.cache
def visible_backgrounds(name: str, style: str) -> tuple[str, ...]:
    """The backgrounds on which an object can be seen."""
    hidden = catalogue()[name].hidden[style]
    return tuple(background for background in BACKGROUNDS if background not in hidden)


@functools.cache
def heldout_background(name: str) -> str:
    """The one background on which this object is never seen in training."""
    everywhere = [
        background
        for background in BACKGROUNDS
        if not any(background in hidden for hidden in catalogue()[name].hidden.values())
    ]
    # An object that is invisible almost everywhere in some style still gets a background.
    choices = everywhere or list(BACKGROUNDS)
    return choices[_draw_of("background", name) % len(choices)]


@functools.cache
def heldout_count(name: str) -> int | None:
    """The number (2 or 3) in which this object is never seen in training; None for half of them."""
    if not catalogue()[name].countable:
        return None
    return {0: 2, 1: 3}.get(_draw_of("count", name) % 4)


@functools.lru_cache(maxsize=1 << 20)
def heldout_relation(a: str, word: str, b: str) -> bool:
    """Whether "a word b", such as ("cat", "left of", "dog"), is never true in training: 1 in 16."""
    if word in ("right of", "below"):
        a, word, b = b, CONVERSE[word], a
    return a != b and _draw_of("relation", a, word, b) % 16 == 0


@functools.lru_cache(maxsize=4096)
def _heldout_partners(a: str, others: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    """All (relation, b) that are held out for an object, b out of `others`."""
    return tuple((word, b) for word in RELATIONS for b in others if heldout_relation(a, word, b))


def heldout_facts(scene: Scene) -> list[str]:
    """The held-out combinations that are true of a scene, in words."""
    facts = [
        f"{name} on {scene.background}"
        for name in scene.counts
        if heldout_background(name) == scene.background
    ]
    facts += [f"{n} {name}" for name, n in scene.counts.items() if heldout_count(name) == n]
    facts += [
        f"{a.name} {word} {b.name}"
        for a in scene.objects
        for b in scene.objects
        for word in ("left of", "above")
        if a.name != b.name and heldout_relation(a.name, word, b.name) and _holds(a, word, b)
    ]
    return facts


def _apart(a: tuple[float, float, float], b: tuple[float, float, float]) -> bool:
    """Whether two boxes (left, top, side) do not overlap."""
    (ax, ay, aw), (bx, by, bw) = a, b
    return ax + aw <= bx or bx + bw <= ax or ay + aw <= by or by + bw <= ay


@functools.cache
def _layouts(sides: tuple[int, ...]) -> tuple[tuple[tuple[int, int, int], ...], ...]:
    """All ways to put boxes of these sides on the grid without overlap."""
    if not sides:
        return ((),)
    last = sides[-1]
    spots = range(GRID - last + 1)
    return tuple(
        (*before, (x, y, last))
        for before in _layouts(sides[:-1])
        for x in spots
        for y in spots
        if all(_apart((x, y, last), other) for other in before)
    )


def _snapped_boxes(stream: Stream, n: int) -> list[tuple[float, float, float]]:
    sides = tuple(stream.choice((SMALL, LARGE)) for _ in range(n))
    return [(x / GRID, y / GRID, w / GRID) for x, y, w in stream.choice(_layouts(sides))]


def _free_boxes(stream: Stream, n: int, size: int) -> list[tuple[float, float, float]]:
    for _ in range(20):
        boxes: list[tuple[float, float, float]] = []
        for _ in range(n):
            side = stream.choice((SMALL, LARGE)) * size // GRID
            left, top = stream.below(size - side + 1), stream.below(size - side + 1)
            box = (left / size, top / size, side / size)
            if all(_apart(box, other) for other in boxes):
                boxes.append(box)
        if len(boxes) == n:
            return boxes
    return _snapped_boxes(stream, n)


def _boxes(stream: Stream, n: int, places: str, size: int) -> list[tuple[float, float, float]]:
    return _snapped_boxes(stream, n) if places == "snapped" else _free_boxes(stream, n, size)


@dataclass(frozen=True)
class World:
    """What scenes may be made of.

    Attributes:
      concepts: names of objects.
      styles: drawing styles; each scene is drawn in one.
      places: "snapped" to a grid of eighths, or "free": any pixel.
      max_objects: 1 to 3.
      size: the side of the picture in pixels, a multiple of 8; "free" places depend on it.
    """

    concepts: tuple[str, ...]
    styles: tuple[str, ...]
    places: str
    max_objects: int
    size: int

    def on(self, background: str, style: str) -> tuple[str, ...]:
        """The concepts that can be seen on a background."""
        return _concepts_on(self.concepts, background, style)


@functools.lru_cache(maxsize=256)
def _concepts_on(concepts: tuple[str, ...], background: str, style: str) -> tuple[str, ...]:
    return tuple(name for name in concepts if background in visible_backgrounds(name, style))


def training_scene(stream: Stream, world: World) -> Scene:
    """Draws a scene that contains no held-out combination."""
    style = stream.choice(world.styles)
    while True:
        background = stream.choice(tuple(BACKGROUNDS))
        seen = world.on(background, style)
        if not seen:
            continue
        n = 1 + stream.below(world.max_objects)
        names = _names(stream, n, seen)
        boxes = _boxes(stream, len(names), world.places, world.size)
        objects = tuple(Placed(name, *box) for name, box in zip(names, boxes, strict=True))
        scene = Scene(background, style, objects)
        if not heldout_facts(scene):
            return scene


def _names(stream: Stream, n: int, seen: tuple[str, ...]) -> list[str]:
    """Names of up to n objects, some of them the same."""
    names: list[str] = []
    for repeats in stream.choice(_REPEATS[n]):
        name = stream.choice(seen)
        if name in names:
            break
        names += [name] * (repeats if catalogue()[name].countable else 1)
    return names


def heldout_scene(stream: Stream, world: World) -> Scene:
    """Draws a scene that contains at least one held-out combination."""
    kinds = _HELDOUT_KINDS[: 1 if world.max_objects == 1 else 3]
    while True:
        style, kind = stream.choice(world.styles), stream.choice(kinds)
        proposals = {"background": _unseen_background, "count": _unseen_count}
        scene = proposals.get(kind, _unseen_relation)(stream, world, style)
        if scene is not None:
            return scene


def _complete(
    stream: Stream, world: World, style: str, background: str, names: list[str]
) -> Scene | None:
    """Adds other objects up to a random number and places all."""
    others = world.on(background, style)
    if any(name not in others for name in names):
        return None
    for _ in range(stream.below(world.max_objects - len(names) + 1)):
        other = stream.choice(others)
        if other in names:
            break
        names.append(other)
    boxes = _boxes(stream, len(names), world.places, world.size)
    objects = tuple(Placed(name, *box) for name, box in zip(names, boxes, strict=True))
    return Scene(background, style, objects)


def _unseen_background(stream: Stream, world: World, style: str) -> Scene | None:
    name = stream.choice(world.concepts)
    return _complete(stream, world, style, heldout_background(name), [name])


def _unseen_count(stream: Stream, world: World, style: str) -> Scene | None:
    name = stream.choice(world.concepts)
    count = heldout_count(name)
    if count is None or count > world.max_objects or not visible_backgrounds(name, style):
        return None
    background = stream.choice(visible_backgrounds(name, style))
    return _complete(stream, world, style, background, [name] * count)


def _unseen_relation(stream: Stream, world: World, style: str) -> Scene | None:
    a = stream.choice(world.concepts)
    partners = _heldout_partners(a, world.concepts)
    if not partners or not visible_backgrounds(a, style):
        return None
    word, b = stream.choice(partners)
    background = stream.choice(visible_backgrounds(a, style))
    for _ in range(8):
        scene = _complete(stream, world, style, background, [a, b])
        if scene is None or relation(scene.objects[0], scene.objects[1]) == word:
            return scene
    return None


def scenes(seed: int, split: str, world: World, start: int = 0) -> Iterator[Scene]:
    """Yields the facts of scene `start`, `start + 1` and so on, without drawing them."""
    index = start
    while True:
        yield scene_at(seed, split, index, world)
        index += 1


def scene_at(seed: int, split: str, index: int, world: World) -> Scene:
    """The facts of one scene: a pure function of its arguments."""
    make = training_scene if split == "train" else heldout_scene
    return make(Stream(seed, split, index), world)
