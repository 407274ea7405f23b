"""Pictures as tiles that are encoded apart, and put together again without seams.

Axes: T tiles, row by row.
"""

import itertools
from collections.abc import Iterator, Sequence

import numpy as np

from instella_jax.data.transforms import resize

# First and last but one pixel of a tile along an axis.
Span = tuple[int, int]


def spans(length: int, count: int, overlap: int) -> list[Span]:
    """Cut an axis into parts that reach `overlap` pixels into their neighbours.

    Args:
      length: of the axis in pixels.
      count: parts, at most `length`.
      overlap: pixels on each inner side.
    """
    edges = [number * length // count for number in range(count + 1)]
    return [
        (max(0, start - overlap), min(length, stop + overlap))
        for start, stop in itertools.pairwise(edges)
    ]


def cut(
    image: np.ndarray, rows: int, columns: int, overlap: int, height: int, width: int
) -> np.ndarray:
    """Cut a picture into tiles and resize each.

    Args:
      image: uint8 [h, w, 3].
      rows: of tiles.
      columns: of tiles.
      overlap: see `spans`.
      height: of each result in pixels.
      width: likewise.

    Returns:
      uint8 [T, height, width, 3].
    """
    places = _places(image.shape[0], image.shape[1], rows, columns, (overlap, overlap))
    return np.stack([resize(image[y, x], height, width) for y, x in places])


def join(
    tiles: np.ndarray | Sequence[np.ndarray],
    rows: int,
    columns: int,
    overlaps: tuple[int, int],
    height: int,
    width: int,
) -> np.ndarray:
    """Put tiles together to a picture; where they overlap one passes into the other.

    Args:
      tiles: uint8 [T, h, w, 3].
      rows: of tiles.
      columns: of tiles.
      overlaps: down and across, in pixels of the result, see `spans`.
      height: of the result in pixels.
      width: likewise.

    Returns:
      uint8 [height, width, 3].
    """
    places = list(_places(height, width, rows, columns, overlaps))
    sized = [
        resize(tile, y.stop - y.start, x.stop - x.start)
        for tile, (y, x) in zip(tiles, places, strict=True)
    ]
    if not any(overlaps):
        picture = np.empty((height, width, 3), np.uint8)
        for tile, place in zip(sized, places, strict=True):
            picture[place] = tile
        return picture
    down, across = _ramps(height, rows, overlaps[0]), _ramps(width, columns, overlaps[1])
    total = np.zeros((height, width, 3), np.float32)
    for number, (tile, place) in enumerate(zip(sized, places, strict=True)):
        row, column = divmod(number, columns)
        total[place] += tile * (down[row][:, None, None] * across[column][:, None])
    return np.round(total).astype(np.uint8)


def _places(
    height: int, width: int, rows: int, columns: int, overlaps: tuple[int, int]
) -> Iterator[tuple[slice, slice]]:
    for y in spans(height, rows, overlaps[0]):
        for x in spans(width, columns, overlaps[1]):
            yield slice(*y), slice(*x)


def _ramps(length: int, count: int, overlap: int) -> list[np.ndarray]:
    """Return weights along each span; those of all spans sum to one everywhere."""
    weights = []
    for start, stop in spans(length, count, overlap):
        place = np.arange(start, stop) + 0.5
        # From 0 where this tile begins to 1 where the one before it ends.
        ramp = max(2 * overlap, 1)
        rise = (place - start) / ramp if start else np.ones(len(place))
        fall = (stop - place) / ramp if stop < length else np.ones(len(place))
        weights.append(np.minimum(1.0, rise) * np.minimum(1.0, fall))
    return [weight.astype(np.float32) for weight in weights]
