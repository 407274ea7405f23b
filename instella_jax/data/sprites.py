"""The emoji sprites shipped with the package: names, words and pixels.

`assets/sprites/sprites.zip` is written by `tools/build_sprites.py`. It holds `index.json` and one
64x64 RGBA WebP image per concept and style. Everything here is read once and cached.
"""

import functools
import io
import json
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from instella_jax.errors import UserError

ASSET = Path(__file__).resolve().parent.parent / "assets" / "sprites" / "sprites.zip"
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

_PREPOSITIONS = re.compile(r" (?:with|without|of|in|on|behind|from|under|at|for|wearing) ")
_PLURALS = {"fish": "fish", "sheep": "sheep", "deer": "deer", "bison": "bison", "ox": "oxen"}
_PLURALS |= {"man": "men", "woman": "women", "child": "children", "person": "people"}
_PLURALS |= {"mouse": "mice", "goose": "geese", "tooth": "teeth", "foot": "feet", "leaf": "leaves"}
_PLURALS |= {"wolf": "wolves", "knife": "knives", "loaf": "loaves", "shrimp": "shrimp"}
_SINGULAR_IN_S = re.compile(r"(?:ss|us|is)$|^(?:lens|gas)$")
_AN_EXCEPTIONS = re.compile(r"^(?:uni|eu|one|us|ut|uk)")


@dataclass(frozen=True)
class Concept:
    """One thing that can stand in a scene.

    Attributes:
      name: what captions call it, unique, lower case, such as "red heart".
      code: Unicode code points in hexadecimal, joined by "-".
      group: emojibase's group, such as "animals-nature".
      keywords: emojibase's tags.
      hidden: per style, the backgrounds on which it can hardly be seen.
    """

    name: str
    code: str
    group: str
    keywords: tuple[str, ...]
    hidden: dict[str, tuple[str, ...]]

    @functools.cached_property
    def countable(self) -> bool:
        """Whether "a name" and "two names" are English ("grapes" is not)."""
        head = _PREPOSITIONS.split(self.name, maxsplit=1)[0].split()[-1]
        return not head.endswith("s") or bool(_SINGULAR_IN_S.search(head))

    @functools.cached_property
    def singular(self) -> str:
        """The name with its article: "a cat", "an apple", "grapes"."""
        if not self.countable:
            return self.name
        vowel = self.name[0] in "aeiou" and not _AN_EXCEPTIONS.match(self.name)
        return f"{'an' if vowel or self.name.startswith('hour') else 'a'} {self.name}"

    @functools.cached_property
    def plural(self) -> str:
        """The name in the plural: "cats", "butterflies", "hearts with arrow"."""
        head = _PREPOSITIONS.split(self.name, maxsplit=1)[0]
        *before, noun = head.split()
        if noun in _PLURALS:
            noun = _PLURALS[noun]
        elif re.search(r"(?:s|x|z|ch|sh|[^o]to)$", noun):
            noun += "es"
        elif re.search(r"[^aeiou]y$", noun):
            noun = noun[:-1] + "ies"
        else:
            noun += "s"
        return " ".join([*before, noun]) + self.name[len(head) :]


@functools.cache
def _archive() -> zipfile.ZipFile:
    # Read whole: an open file would be shared by forked data workers.
    return zipfile.ZipFile(io.BytesIO(ASSET.read_bytes()))


@functools.cache
def catalogue() -> dict[str, Concept]:
    """All shipped concepts by name, in a fixed order."""
    index = json.loads(_archive().read("index.json"))
    return {
        entry["name"]: Concept(
            name=entry["name"],
            code=entry["code"],
            group=entry["group"],
            keywords=tuple(entry["keywords"]),
            hidden={style: tuple(names) for style, names in entry["hidden"].items()},
        )
        for entry in index["concepts"]
    }


@functools.cache
def styles() -> tuple[str, ...]:
    """The drawing styles in the asset."""
    return tuple(json.loads(_archive().read("index.json"))["styles"])


def select(concepts: str | tuple[str, ...]) -> tuple[str, ...]:
    """Resolves "core", "all" or a tuple of names to concept names.

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
            f"unknown concepts {unknown}: expected names out of instella_jax.data.sprites."
            "catalogue(), such as 'cat' or 'red heart', and at least one"
        )
    return tuple(concepts)


@functools.lru_cache(maxsize=4096)
def _rgba(name: str, style: str) -> np.ndarray:
    """Premultiplied sprite [64, 64, 4], float32 in [0, 1]."""
    from PIL import Image

    data = _archive().read(f"{style}/{catalogue()[name].code}.webp")
    pixels = np.asarray(Image.open(io.BytesIO(data)).convert("RGBA"), np.float32) / 255
    return np.concatenate([pixels[..., :3] * pixels[..., 3:], pixels[..., 3:]], axis=-1)


@functools.cache
def _resize_matrix(source: int, target: int) -> np.ndarray:
    """Weights [target, source] of an antialiased linear resize."""
    scale = max(source / target, 1.0)
    centres = (np.arange(target) + 0.5) * source / target
    distance = np.abs(np.arange(source) + 0.5 - centres[:, None]) / scale
    weights = np.maximum(1 - distance, 0)
    return (weights / weights.sum(1, keepdims=True)).astype(np.float32)


@functools.lru_cache(maxsize=4096)
def sprite(name: str, style: str, side: int) -> np.ndarray:
    """A sprite resized to [side, side, 4], premultiplied float32 in [0, 1]; do not write to it."""
    matrix = _resize_matrix(SPRITE_SIDE, side)
    rows = np.tensordot(matrix, _rgba(name, style), axes=1)
    pixels = np.clip(np.moveaxis(np.tensordot(matrix, rows, axes=(1, 1)), 0, 1), 0, 1)
    pixels.flags.writeable = False
    return pixels


@functools.lru_cache(maxsize=4096)
def tile(name: str, style: str, side: int, background: str) -> np.ndarray:
    """A sprite painted on a named background: uint8 [side, side, 3]; do not write to it."""
    pixels = sprite(name, style, side)
    ground = np.asarray(BACKGROUNDS[background], np.float32) / 255
    painted = pixels[..., :3] + ground * (1 - pixels[..., 3:])
    painted = np.rint(np.clip(painted, 0, 1) * 255).astype(np.uint8)
    painted.flags.writeable = False
    return painted
