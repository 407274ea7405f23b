"""Does a picture show what its prompt says? A judge for emoji scenes, by template matching.

`read` finds the facts of a picture (matching pursuit over all sprites, places and two sizes) and
`compare` checks them against those of the prompt. It is a ruler for progress, not a perception
model: it knows the sprites it looks for, and calls everything else background.
"""

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from instella_jax.data.scenes import sprites
from instella_jax.data.scenes.scene import GRID, LARGE, SMALL, Placed, Scene, relation

# Pictures are read at this size, whatever their own.
SIDE = 48
# More than a scene can hold, so that surplus objects are seen too.
MOST_OBJECTS = 5
# How strong a sprite must stand out from the background, against 1 as drawn, to be called found.
FOUND = 0.5
# Softness of a background's colour, in units of 255.
COLOUR_WIDTH = 20.0
# How far, in fractions of the side, an object may be from where it should be.
TOLERANCE = 3 / 16


@dataclass(frozen=True)
class Judgement:
    """What is right about one picture.

    Attributes:
      background: the background has the right colour.
      objects: exactly the right kinds of objects are there.
      count: the number of objects is right, whatever they are.
      position: every object is there, and stands to those of other kinds as it should; where there
        is one kind only, each is where it should be.
      seen: what the judge saw.
    """

    background: bool
    objects: bool
    count: bool
    position: bool
    seen: Scene


def judge(
    images: np.ndarray, scenes: Sequence[Scene], concepts: Sequence[str] = sprites.CORE
) -> list[Judgement]:
    """Judge pictures against the facts they should show.

    Args:
      images: uint8 [B, S, S, 3].
      scenes: the B facts.
      concepts: the objects that may be seen; those of the scenes are added.

    Returns:
      B judgements.
    """
    known = tuple(dict.fromkeys([*concepts, *(o.name for s in scenes for o in s.objects)]))
    return [
        compare(read(image, scene.style, known), scene)
        for image, scene in zip(images, scenes, strict=True)
    ]


def summarise(judgements: Sequence[Judgement]) -> dict[str, float]:
    """Return the share of pictures that are right in each respect, in [0, 1]."""
    return {
        name: float(np.mean([getattr(one, name) for one in judgements]))
        for name in ("background", "objects", "count", "position")
    }


def compare(seen: Scene, truth: Scene) -> Judgement:
    """Check the facts seen in a picture against those it should show."""
    return Judgement(
        background=seen.background == truth.background,
        objects=seen.counts.keys() == truth.counts.keys(),
        count=len(seen.objects) == len(truth.objects),
        position=any(_agree(order, truth) for order in _assignments(seen, truth)),
        seen=seen,
    )


def _assignments(seen: Scene, truth: Scene):
    """Return all ways to find each object of the truth among those seen."""
    candidates = [[s for s in seen.objects if s.name == t.name] for t in truth.objects]
    for order in itertools.product(*candidates):
        if len({id(placed) for placed in order}) == len(order):
            yield order


def _agree(order: Sequence[Placed], truth: Scene) -> bool:
    """Return whether objects stand as in the truth, one to one."""
    if len(truth.counts) == 1:
        return all(_near(one, other) for one, other in zip(order, truth.objects, strict=True))
    pairs = itertools.combinations(range(len(order)), 2)
    return all(
        _stands(relation(truth.objects[i], truth.objects[j]), order[i], order[j])
        for i, j in pairs
        if truth.objects[i].name != truth.objects[j].name
    )


def _near(one: Placed, other: Placed) -> bool:
    if one.place == other.place:
        return True
    return max(abs(one.x - other.x), abs(one.y - other.y)) <= TOLERANCE


def _stands(word: str | None, a: Placed, b: Placed) -> bool:
    """Return whether a stands to b as the word says, by at least half a step of the grid."""
    dx, dy = b.x - a.x, b.y - a.y
    distance = {"left of": dx, "right of": -dx, "above": dy, "below": -dy, None: 1.0}
    return distance[word] >= 0.5 / GRID


def read(image: np.ndarray, style: str, concepts: tuple[str, ...] = sprites.CORE) -> Scene:
    """Find the background and the objects of a picture.

    Args:
      image: uint8 [S, S, 3].
      style: the drawing style of the sprites to look for.
      concepts: their names.

    Returns:
      The facts, the surest object first; places are multiples of 1/SIDE.
    """
    pixels = _resized(image)
    background = _background(pixels)
    rest = pixels - np.asarray(sprites.BACKGROUNDS[background], np.float32) / 255
    found: list[Placed] = []
    while len(found) < MOST_OBJECTS:
        best, where = 0.0, None
        for units in (SMALL, LARGE):
            side = units * SIDE // GRID
            templates, energy = _templates(concepts, style, side, background)
            # A faint copy counts too: the energy explained at the best strength up to 1.
            match = _patches(rest, side) @ templates.T
            strength = np.clip(match / energy, 0, 1)
            score = np.where(
                match > FOUND * energy, strength * (2 * match - strength * energy), 0.0
            )
            score = score * _free(found, side)[:, None]
            place, number = np.unravel_index(score.argmax(), score.shape)
            if score[place, number] > best:
                best = score[place, number]
                where = side, int(place), int(number), strength[place, number]
        if where is None:
            break
        side, place, number, faint = where
        steps = SIDE - side + 1
        top, left = divmod(place, steps)
        found.append(Placed(concepts[number], left / SIDE, top / SIDE, side / SIDE))
        template = _templates(concepts, style, side, background)[0][number]
        rest[top : top + side, left : left + side] -= faint * template.reshape(side, side, 3)
    return Scene(background, style, tuple(found))


def _resized(image: np.ndarray) -> np.ndarray:
    """Return the picture at SIDE, float32 [SIDE, SIDE, 3] in [0, 1]."""
    pixels = image.astype(np.float32) / 255
    rows, columns = (sprites.resize_matrix(n, SIDE) for n in image.shape[:2])
    return np.einsum("ij,jkc,lk->ilc", rows, pixels, columns, optimize=True)


def _background(pixels: np.ndarray) -> str:
    """Return the named colour that most of the picture has."""
    names = list(sprites.BACKGROUNDS)
    colours = np.asarray([sprites.BACKGROUNDS[name] for name in names], np.float32)
    distance = np.square(pixels[:, :, None] * 255 - colours).sum(-1)
    return names[int(np.exp(-distance / (2 * COLOUR_WIDTH**2)).sum((0, 1)).argmax())]


@functools.lru_cache(maxsize=64)
def _templates(
    concepts: tuple[str, ...], style: str, side: int, background: str
) -> tuple[np.ndarray, np.ndarray]:
    """Return what each sprite adds to the background, [C, side * side * 3], and its energy [C]."""
    ground = np.asarray(sprites.BACKGROUNDS[background], np.float32) / 255
    drawn = np.stack([sprites.sprite(name, style, side) for name in concepts])
    added = (drawn[..., :3] - drawn[..., 3:] * ground).reshape(len(concepts), -1)
    return added, np.square(added).sum(1) + 1e-6


def _patches(rest: np.ndarray, side: int) -> np.ndarray:
    """Return all squares of a picture, row by row: [steps * steps, side * side * 3]."""
    windows = np.lib.stride_tricks.sliding_window_view(rest, (side, side), axis=(0, 1))
    windows = windows.transpose(0, 1, 3, 4, 2)
    return windows.reshape(windows.shape[0] * windows.shape[1], -1)


def _free(found: Sequence[Placed], side: int) -> np.ndarray:
    """Return which squares lie mostly outside what was found: bool [steps * steps]."""
    starts = np.arange(SIDE - side + 1) / SIDE
    width = side / SIDE
    free = np.ones((len(starts), len(starts)), bool)
    for placed in found:
        x, y = (
            np.clip(np.minimum(starts + width, low + placed.side) - np.maximum(starts, low), 0, 1)
            for low in (placed.left, placed.top)
        )
        free &= y[:, None] * x < 0.3 * min(width, placed.side) ** 2
    return free.reshape(-1)
