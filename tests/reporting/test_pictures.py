"""Grids: every pixel of every picture is there, captions fit, files are whole."""

import numpy as np
import pytest
from PIL import Image

from instella_jax.reporting.pictures import draw_grid, save_grid, save_png


def pictures(n, height=8, width=8):
    return np.random.default_rng(0).integers(0, 256, (n, height, width, 3), np.uint8)


def find(grid, block):
    """Return the corners (top, left) where `block` [h, w, 3] occurs in `grid` [H, W, 3]."""
    windows = np.lib.stride_tricks.sliding_window_view(grid, block.shape)[:, :, 0]
    return [tuple(map(int, corner)) for corner in np.argwhere((windows == block).all((2, 3, 4)))]


def test_pictures_are_enlarged_crisply_and_in_reading_order():
    images = pictures(5, height=6, width=9)
    grid = draw_grid(images, ["one", "two", "three", "four", "five"])
    corners = []
    for image in images:
        found = find(grid, np.kron(image, np.ones((15, 15, 1), np.uint8)))
        assert len(found) == 1
        corners += found
    assert corners == sorted(corners)
    assert len({top for top, _ in corners}) == 2 and len({left for _, left in corners}) == 3


@pytest.mark.parametrize("pairs", [1, 3, 5, 16])
def test_pictures_that_belong_together_are_in_one_row(pairs):
    # Each pair has a colour of its own, the first bright and the second dark.
    colours = np.random.default_rng(1).permutation(100)[:pairs] + 10
    images = np.stack([np.full((128, 128, 3), c + d) for c in colours for d in (120, 0)])
    grid = draw_grid(images.astype(np.uint8), together=2)
    for index in range(0, 2 * pairs, 2):
        rows = [
            np.unique(np.nonzero((grid == c).all(-1))[0]) for c in images[index : index + 2, 0, 0]
        ]
        np.testing.assert_array_equal(*rows)


def test_captions_are_drawn_under_their_picture_alone():
    images = pictures(2, 32, 32)
    bare = draw_grid(images, ["", "x"])
    full = draw_grid(images, ["abc", "x"])
    rows, columns = np.nonzero((bare != full).any(-1))
    top, left = find(bare, images[0].repeat(4, 0).repeat(4, 1))[0]
    assert rows.min() >= top + 128 and columns.min() >= left and columns.max() < left + 128


def test_long_captions_stay_inside_their_cell():
    images = pictures(1, 16, 16)
    short = draw_grid(images, ["a"])
    for caption in ("many words " * 50, "W" * 300):
        grid = draw_grid(images, [caption])
        assert grid.shape[1] == short.shape[1] and short.shape[0] < grid.shape[0] < 400
        margin = grid[:, -6:]
        assert (margin == margin[0, 0]).all()


def test_default_scale_makes_small_pictures_readable():
    assert draw_grid(pictures(1, 64, 64)).shape[1] >= 128
    assert draw_grid(pictures(1, 256, 256)).shape[1] < 300


def test_save_grid_writes_what_it_returns_and_leaves_no_scraps(tmp_path):
    path = tmp_path / "new" / "grid.png"
    grid = save_grid(path, pictures(3), ["a", "b", "c"])
    np.testing.assert_array_equal(np.asarray(Image.open(path)), grid)
    assert [entry.name for entry in path.parent.iterdir()] == ["grid.png"]


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    save_png(path, pictures(1)[0])
    before = path.read_bytes()

    def fail(self, target, **options):
        target.write_bytes(b"half a file")
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        save_png(path, pictures(2)[1])
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    "images, arguments",
    [
        (pictures(2).astype(np.float32), {}),
        (pictures(2)[0], {}),
        (pictures(2)[:0], {}),
        (pictures(2), {"captions": ["one"]}),
    ],
)
def test_wrong_input_is_refused(images, arguments):
    with pytest.raises(ValueError):
        draw_grid(images, **arguments)
