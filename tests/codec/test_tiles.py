"""Pictures cut into tiles and joined again."""

import numpy as np
import pytest

from instella_jax.codec import tiles
from instella_jax.codec.shapes import decoding_shape, encoding_shape, trained_shapes


@pytest.mark.parametrize("overlap", [0, 1, 3])
def test_tiles_at_their_own_size_join_to_the_picture(overlap):
    rng = np.random.default_rng(0)
    for height, width, rows, columns in [(48, 60, 4, 3), (47, 61, 4, 3), (12, 7, 1, 1)]:
        image = rng.integers(0, 256, (height, width, 3), np.uint8)
        down = tiles.spans(height, rows, overlap)
        across = tiles.spans(width, columns, overlap)
        parts = [image[slice(*y), slice(*x)] for y in down for x in across]
        joined = tiles.join(parts, rows, columns, (overlap, overlap), height, width)
        np.testing.assert_array_equal(joined, image)


def test_each_pixel_is_in_the_tiles_that_reach_it():
    count = np.zeros(47, int)
    for start, stop in tiles.spans(47, 4, 3):
        count[start:stop] += 1
    assert count.min() == 1 and count.max() == 2 and np.sum(count == 2) == 3 * 6


def test_one_tile_passes_into_the_next():
    black, white = np.zeros((8, 13, 3), np.uint8), np.full((8, 13, 3), 255, np.uint8)
    joined = tiles.join([black, white], 1, 2, (0, 3), 8, 20)
    row = joined[0, :, 0].astype(int)
    assert (row[:7] == 0).all() and (row[13:] == 255).all()
    steps = np.diff(row[6:14])
    assert steps.min() > 0 and steps[1:-1].max() - steps[1:-1].min() <= 1


def test_shapes_are_those_that_were_trained():
    assert trained_shapes({"image_size": 64}) == ((64, 64),)
    shapes = trained_shapes({"image_size": 64, "shapes": [[64, 64], [48, 80], [96, 160]]})
    assert shapes == ((64, 64), (48, 80), (96, 160))
    assert encoding_shape(shapes, 600, 1_000) == (96, 160)
    assert encoding_shape(shapes, 60, 100) == (48, 80)
    assert encoding_shape(shapes, 1_000, 600) == (64, 64)
    assert decoding_shape(shapes, 48, 80) == (48, 80)
    assert decoding_shape(shapes, 51, 85) == (96, 160)
    assert decoding_shape(shapes, 6_000, 10_000) == (96, 160)
