"""At which size pictures are encoded and decoded: one that the tokenizer was trained at."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from instella_jax.data.buckets import Shape, assign


def trained_shapes(description: Mapping[str, Any]) -> tuple[Shape, ...]:
    """Return heights and widths that a tokenizer was trained at, () where `config.json` is silent.

    Args:
      description: of its model folder: "shapes", or else one "image_size".
    """
    side = int(description.get("image_size", 0))
    shapes = [tuple(map(int, shape)) for shape in description.get("shapes", ())]
    found = shapes or ([(side, side)] if side else [])
    return tuple((height, width) for height, width in found)


def encoding_shape(shapes: Sequence[Shape], height: int, width: int) -> Shape:
    """Return the trained shape for a picture: the one of its bucket, see `data.buckets`."""
    return shapes[int(assign(np.array([[width, height]]), shapes)[0])]


def decoding_shape(shapes: Sequence[Shape], height: int, width: int) -> Shape:
    """Return the trained shape that a picture of a wanted size is decoded at.

    That of the closest aspect ratio; of equally close ones the smallest that covers the picture,
    or else the largest.
    """

    def distance(shape: Shape) -> float:
        one, other = width * shape[0], height * shape[1]
        return max(one, other) / min(one, other)

    closest = min(map(distance, shapes))
    near = sorted(
        (shape for shape in shapes if distance(shape) == closest), key=lambda s: s[0] * s[1]
    )
    return next((s for s in near if s[0] >= height and s[1] >= width), near[-1])
