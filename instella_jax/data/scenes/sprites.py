"""The emoji sprites shipped with the package: names, words and pixels.

`assets/sprites/sprites.zip` is written by `tools/build_sprites.py`. It holds `index.json` and one
64x64 RGBA WebP image per concept and style. Everything here is read once and cached.
"""

import functools
import io
import json
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from instella_jax.data.scenes import english
from instella_jax.errors import UserError

ASSET = Path(__file__).parents[2] / "assets" / "sprites" / "sprites.zip"
SPRITE_SIDE = 64

# Far from each other and from the lighter tones in which the sprites are painted.
BACKGROUNDS = {
    "white": (255, 255, 255),
    "black": (16, 16, 16),
    "gray": (128, 128, 128),
    "red": (205, 25, 35),
    "orange": (245, 140, 20),
    "yellow": (250, 222, 60),
    "green": (30, 130, 60),
    "blue": (30, 70, 190),
    "purple": (110, 45, 150),
    "pink": (250, 165, 200),
}

_COLOURED = tuple(
    f"{colour} {shape}"
    for shape in ("heart", "circle", "square")
    for colour in ("red", "yellow", "green", "blue", "purple")
)
CORE = _COLOURED + (
    *("cat", "dog", "pig", "frog", "panda", "fox", "fish", "butterfly"),
    *("tree", "cactus", "tulip", "mushroom"),
    *("apple", "banana", "strawberry", "lemon", "watermelon", "carrot"),
    *("pizza", "burger", "cookie"),
    *("car", "bus", "rocket", "house", "boat"),
    *("sun", "moon", "star", "cloud"),
    *("balloon", "crown", "gift"),
)


@dataclass(frozen=True)
class Concept:
    """One thing that can stand in a scene.

    Attributes:
      name: what captions call it, unique, lower case, such as "red heart".
      code: Unicode code points in hexadecimal, joined by "-".
      group: emojibase's group, such as "animals-nature".
      hidden: per style, the backgrounds on which it can hardly be seen.
    """

    name: str
    code: str
    group: str
    hidden: dict[str, tuple[str, ...]]

    @functools.cached_property
    def countable(self) -> bool:
        """Whether there can be two of it in words; see `english.is_countable`."""
        return english.is_countable(self.name)

    @functools.cached_property
    def singular(self) -> str:
        """The name with its article: "a cat", "an apple", "scissors"."""
        return english.with_article(self.name)

    @functools.cached_property
    def plural(self) -> str:
        """The name in the plural: "cats", "butterflies"."""
        return english.plural(self.name)


@functools.cache
def _archive() -> zipfile.ZipFile:
    # Read whole: an open file would be shared by forked data workers.
    return zipfile.ZipFile(io.BytesIO(ASSET.read_bytes()))


@functools.cache
def catalogue() -> dict[str, Concept]:
    """Return all shipped concepts by name, in a fixed order."""
    index = json.loads(_archive().read("index.json"))
    return {
        entry["name"]: Concept(
            name=entry["name"],
            code=entry["code"],
            group=entry["group"],
            hidden={style: tuple(names) for style, names in entry["hidden"].items()},
        )
        for entry in index["concepts"]
    }


@functools.cache
def styles() -> tuple[str, ...]:
    """Return the drawing styles in the asset."""
    return tuple(json.loads(_archive().read("index.json"))["styles"])


def select(concepts: str | tuple[str, ...]) -> tuple[str, ...]:
    """Resolve "core", "all" or a tuple of names to concept names.

    Raises:
      UserError: a name is not in the catalogue.
    """
    if concepts == "core":
        return CORE
    if concepts == "all":
        return tuple(catalogue())
    if isinstance(concepts, str):
        raise UserError(
            f"unknown concept set {concepts!r}: expected 'core', 'all' or a list of names"
        )
    unknown = [name for name in concepts if name not in catalogue()]
    if unknown or not concepts:
        raise UserError(
            f"unknown concepts {unknown}: expected names out of instella_jax.data.scenes.sprites."
            "catalogue(), such as 'cat' or 'red heart', and at least one"
        )
    return tuple(concepts)


@functools.cache
def visible_backgrounds(name: str, style: str) -> tuple[str, ...]:
    """Return the backgrounds on which an object can be seen."""
    hidden = catalogue()[name].hidden[style]
    return tuple(background for background in BACKGROUNDS if background not in hidden)


@functools.lru_cache(maxsize=4096)
def _rgba(name: str, style: str) -> np.ndarray:
    """Return premultiplied sprite [64, 64, 4], float32 in [0, 1]."""
    from PIL import Image

    data = _archive().read(f"{style}/{catalogue()[name].code}.webp")
    pixels = np.asarray(Image.open(io.BytesIO(data)).convert("RGBA"), np.float32) / 255
    return np.concatenate([pixels[..., :3] * pixels[..., 3:], pixels[..., 3:]], axis=-1)


@functools.cache
def resize_matrix(source: int, target: int) -> np.ndarray:
    """Return weights [target, source] of an antialiased linear resize; do not write to it."""
    scale = max(source / target, 1.0)
    centres = (np.arange(target) + 0.5) * source / target
    distance = np.abs(np.arange(source) + 0.5 - centres[:, None]) / scale
    weights = np.maximum(1 - distance, 0)
    return (weights / weights.sum(1, keepdims=True)).astype(np.float32)


@functools.lru_cache(maxsize=4096)
def sprite(name: str, style: str, side: int) -> np.ndarray:
    """Return a sprite resized to [side, side, 4], premultiplied float32 in [0, 1]; do not write to
    it."""
    matrix = resize_matrix(SPRITE_SIDE, side)
    rows = np.tensordot(matrix, _rgba(name, style), axes=1)
    pixels = np.clip(np.moveaxis(np.tensordot(matrix, rows, axes=(1, 1)), 0, 1), 0, 1)
    pixels.flags.writeable = False
    return pixels


@functools.lru_cache(maxsize=4096)
def tile(name: str, style: str, side: int, background: str) -> np.ndarray:
    """Return a sprite painted on a named background: uint8 [side, side, 3]; do not write to it."""
    pixels = sprite(name, style, side)
    ground = np.asarray(BACKGROUNDS[background], np.float32) / 255
    painted = pixels[..., :3] + ground * (1 - pixels[..., 3:])
    painted = np.rint(np.clip(painted, 0, 1) * 255).astype(np.uint8)
    painted.flags.writeable = False
    return painted
