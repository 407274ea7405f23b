"""Random scenes: for training without held-out combinations, for evaluation with them."""

import functools
from dataclasses import dataclass

from instella_jax.data.scenes.combinations import (
    heldout_background,
    heldout_count,
    heldout_facts,
    heldout_partners,
)
from instella_jax.data.scenes.scene import GRID, LARGE, SMALL, Placed, Scene, Stream, relation
from instella_jax.data.scenes.sprites import BACKGROUNDS, catalogue, visible_backgrounds

# How n objects repeat: all equally likely.
_REPEATS = {
    1: ((1,),),
    2: ((2,), (1, 1), (1, 1)),
    3: ((3,), (2, 1), (1, 2), (1, 1, 1), (1, 1, 1)),
}
# Places of objects by name: multiples of how many eighths of the side, 0 for any pixel. "thirds"
# are the nine places that captions have words for.
PLACES = {"thirds": 2, "snapped": 1, "free": 0}
_HELDOUT_KINDS = ("background", "count", "relation")
# Left, top and side, in fractions of the picture's.
Box = tuple[float, float, float]


def _apart(a: Box, b: Box) -> bool:
    """Return whether two boxes (left, top, side) do not overlap."""
    (ax, ay, aw), (bx, by, bw) = a, b
    return ax + aw <= bx or bx + bw <= ax or ay + aw <= by or by + bw <= ay


@functools.cache
def _layouts(sides: tuple[int, ...], step: int) -> tuple[tuple[tuple[int, int, int], ...], ...]:
    """Return all ways to put boxes of these sides on every `step`-th line of the grid without
    overlap."""
    if not sides:
        return ((),)
    last = sides[-1]
    spots = range(0, GRID - last + 1, step)
    return tuple(
        (*before, (x, y, last))
        for before in _layouts(sides[:-1], step)
        for x in spots
        for y in spots
        if all(_apart((x, y, last), other) for other in before)
    )


def _snapped_boxes(stream: Stream, n: int, step: int) -> list[Box]:
    sides = tuple(stream.choice((SMALL, LARGE)) for _ in range(n))
    return [(x / GRID, y / GRID, w / GRID) for x, y, w in stream.choice(_layouts(sides, step))]


def _free_boxes(stream: Stream, n: int, size: int) -> list[Box]:
    for _ in range(20):
        boxes: list[Box] = []
        for _ in range(n):
            side = stream.choice((SMALL, LARGE)) * size // GRID
            left, top = stream.below(size - side + 1), stream.below(size - side + 1)
            box = (left / size, top / size, side / size)
            if all(_apart(box, other) for other in boxes):
                boxes.append(box)
        if len(boxes) == n:
            return boxes
    return _snapped_boxes(stream, n, PLACES["snapped"])


def _boxes(stream: Stream, n: int, places: str, size: int) -> list[Box]:
    if step := PLACES[places]:
        return _snapped_boxes(stream, n, step)
    return _free_boxes(stream, n, size)


@dataclass(frozen=True)
class World:
    """What scenes may be made of.

    Attributes:
      concepts: names of objects.
      styles: drawing styles; each scene is drawn in one.
      places: one of PLACES.
      max_objects: 1 to 3.
      size: the side of the picture in pixels, a multiple of 8; "free" places depend on it.
    """

    concepts: tuple[str, ...]
    styles: tuple[str, ...]
    places: str
    max_objects: int
    size: int

    def on(self, background: str, style: str) -> tuple[str, ...]:
        """Return the concepts that can be seen on a background."""
        return _concepts_on(self.concepts, background, style)


@functools.lru_cache(maxsize=256)
def _concepts_on(concepts: tuple[str, ...], background: str, style: str) -> tuple[str, ...]:
    return tuple(name for name in concepts if background in visible_backgrounds(name, style))


def training_scene(stream: Stream, world: World) -> Scene:
    """Sample a scene that contains no held-out combination."""
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
    """Return names of up to n objects, some of them the same."""
    names: list[str] = []
    for repeats in stream.choice(_REPEATS[n]):
        name = stream.choice(seen)
        if name in names:
            break
        names += [name] * (repeats if catalogue()[name].countable else 1)
    return names


def heldout_scene(stream: Stream, world: World) -> Scene:
    """Sample a scene that contains at least one held-out combination."""
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
    """Add other objects up to a random number and place all."""
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
    partners = heldout_partners(a, world.concepts)
    if not partners or not visible_backgrounds(a, style):
        return None
    word, b = stream.choice(partners)
    background = stream.choice(visible_backgrounds(a, style))
    for _ in range(8):
        scene = _complete(stream, world, style, background, [a, b])
        if scene is None or relation(scene.objects[0], scene.objects[1]) == word:
            return scene
    return None


def scene_at(seed: int, split: str, index: int, world: World) -> Scene:
    """Return the facts of one scene: a pure function of its arguments."""
    make = training_scene if split == "train" else heldout_scene
    return make(Stream(seed, split, index), world)
