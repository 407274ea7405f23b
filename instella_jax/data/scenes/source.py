"""The embedded data set: an endless, captioned world of emoji scenes, drawn on demand."""

from typing import Any

import numpy as np

from instella_jax.data.scenes import captions, sprites
from instella_jax.data.scenes.maker import PLACES, World, scene_at
from instella_jax.data.scenes.scene import Scene, Stream
from instella_jax.errors import UserError

SPLITS = ("train", "heldout")


def render(scene: Scene, size: int) -> np.ndarray:
    """Paint a scene: uint8 [size, size, 3]."""
    image = np.empty((size, size, 3), np.uint8)
    image[:] = sprites.BACKGROUNDS[scene.background]
    for thing in scene.objects:
        side = round(thing.side * size)
        top, left = round(thing.top * size), round(thing.left * size)
        tile = sprites.tile(thing.name, scene.style, side, scene.background)
        image[top : top + side, left : left + side] = tile
    return image


class EmojiScenes:
    """Scenes with captions as a grain random-access data source.

    `source[i]` is {"image": uint8 [size, size, 3], "text": str, "facts": Scene}, a pure function of
    (seed, split, i) and the other arguments.
    """

    def __init__(
        self,
        size: int = 64,
        seed: int = 0,
        split: str = "train",
        concepts: str | tuple[str, ...] = "core",
        styles: tuple[str, ...] = ("twemoji",),
        places: str = "snapped",
        max_objects: int = 3,
        length: int = 10_000_000,
    ):
        """Check the arguments and remember them.

        Args:
          size: side of the pictures in pixels, a multiple of 8.
          seed: of the whole data set.
          split: "train", without the held-out combinations, or "heldout", each with one.
          concepts: "core" (48), "all" (about 1,000) or names of concepts.
          styles: out of `sprites.styles()`; each scene is drawn in one of them.
          places: "thirds", nine places; "snapped" to a grid of eighths; or "free", any pixel.
          max_objects: 1 to 3.
          length: how many indices there are.

        Raises:
          UserError: an argument is none of these.
        """
        if size < 16 or size % 8:
            raise UserError(
                f"image_size of emoji scenes is {size}: expected a multiple of 8, >= 16"
            )
        if split not in SPLITS:
            raise UserError(f"unknown split {split!r}: expected one of {SPLITS}")
        if places not in PLACES:
            raise UserError(f"unknown places {places!r}: expected one of {tuple(PLACES)}")
        if max_objects not in (1, 2, 3):
            raise UserError(f"max_objects is {max_objects}: expected 1, 2 or 3")
        unknown = [style for style in styles if style not in sprites.styles()]
        if unknown or not styles:
            raise UserError(f"unknown styles {unknown}: expected some of {sprites.styles()}")
        self.world = World(sprites.select(concepts), tuple(styles), places, max_objects, size)
        self.seed, self.split, self.length = seed, split, length

    def __len__(self) -> int:
        """Return the number of indices."""
        return self.length

    def __repr__(self) -> str:
        """Name the split, which grain shows and stores to recognise the source."""
        return f"EmojiScenes({self.split}, seed={self.seed}, {self.world.size} px)"

    def facts(self, index: int) -> Scene:
        """Return the facts of a scene, without drawing it."""
        if not 0 <= index < self.length:
            raise IndexError(f"scene {index} of {self.length}")
        return scene_at(self.seed, self.split, int(index), self.world)

    def caption(self, index: int, scene: Scene | None = None) -> str:
        """Return the caption of a scene."""
        stream = Stream(self.seed, self.split, "caption", int(index))
        scene = scene or self.facts(index)
        return captions.caption(stream, scene, name_style=len(self.world.styles) > 1)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Draw one scene."""
        scene = self.facts(index)
        return {
            "image": render(scene, self.world.size),
            "text": self.caption(index, scene),
            "facts": scene,
        }


def heldout_prompts(
    n: int,
    seed: int = 0,
    concepts: str | tuple[str, ...] = "core",
    styles: tuple[str, ...] = ("twemoji",),
    places: str = "snapped",
    max_objects: int = 3,
) -> list[tuple[str, Scene]]:
    """Return prompts for evaluation, each of a held-out combination, with the facts they describe.

    Each names all objects, their number and place, and the background. The arguments are those of
    `EmojiScenes`.
    """
    source = EmojiScenes(64, seed, "heldout", concepts, styles, places, max_objects)
    prompts: list[tuple[str, Scene]] = []
    for index in range(len(source)):
        if len(prompts) >= n:
            break
        scene = source.facts(index)
        stream = Stream(seed, "prompt", index)
        text = captions.full_caption(stream, scene, name_style=len(styles) > 1)
        if text is not None:
            prompts.append((text, scene))
    return prompts
