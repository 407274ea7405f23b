"""Crops, resizing, flips: measured on gradients, whose values say where a pixel came from."""

import numpy as np
import pytest
from PIL import Image

from instella_jax.data.transforms import EvalTransform, TrainTransform, crop_resize


def gradient(height, width):
    """uint8 [height, width, 3]: red grows to the right, green downwards, both from 0 to 255."""
    image = np.zeros((height, width, 3), np.uint8)
    image[..., 0] = np.linspace(0, 255, width)
    image[..., 1] = np.linspace(0, 255, height)[:, None]
    return image


def span(line):
    """Part of the gradient that a line of pixels covers, [0, 1]; their spacing is added."""
    low, high = float(line.min()) / 255, float(line.max()) / 255
    return (high - low) * len(line) / (len(line) - 1)


def test_the_same_size_is_untouched():
    image = gradient(48, 64)
    np.testing.assert_array_equal(crop_resize(image, 48, 64), image)


@pytest.mark.parametrize("size", [(64, 64), (32, 96), (96, 32), (200, 120)])
@pytest.mark.parametrize("shape", [(128, 200), (200, 128), (100, 100)])
def test_eval_takes_the_largest_box_from_the_centre(shape, size):
    image = EvalTransform(*size)({"image": gradient(*shape), "texts": ("a", "b")})
    assert image["text"] == "a" and "texts" not in image
    image = image["image"]
    assert image.shape == (*size, 3) and image.dtype == np.uint8
    across, down = span(image[size[0] // 2, :, 0]), span(image[:, size[1] // 2, 1])
    assert max(across, down) == pytest.approx(1, abs=0.03)
    assert across * shape[1] / size[1] == pytest.approx(down * shape[0] / size[0], rel=0.05)
    assert image[..., 0].mean() == pytest.approx(127.5, abs=2)
    assert image[..., 1].mean() == pytest.approx(127.5, abs=2)


def test_train_keeps_80_to_100_percent_of_the_short_side_anywhere():
    transform = TrainTransform(32, 32, flip=0)
    spans, lefts, tops = [], [], []
    rng = np.random.default_rng(0)
    for _ in range(400):
        image = transform({"image": gradient(100, 150), "texts": ("a",)}, rng)["image"]
        down = span(image[:, 16, 1])
        spans.append(down)
        # Undistorted: the same number of source pixels each way.
        assert span(image[16, :, 0]) * 150 == pytest.approx(down * 100, rel=0.06)
        lefts.append(image[16, 0, 0] / 255)
        tops.append(image[0, 16, 1] / 255)
    assert 0.78 < min(spans) < 0.82 and 0.98 < max(spans) < 1.03
    assert np.mean(spans) == pytest.approx(0.9 * 100 / 99, abs=0.01)  # 100 pixels, 99 steps
    assert min(lefts) < 0.03 and max(lefts) > 0.37 and max(tops) > 0.13


@pytest.mark.parametrize("flip, expected", [(0.0, 0), (0.5, 100), (1.0, 200)])
def test_flip(flip, expected):
    transform = TrainTransform(16, 16, flip=flip)
    mirrored = 0
    for seed in range(200):
        image = transform({"image": gradient(32, 32)}, np.random.default_rng(seed))["image"]
        mirrored += int(image[8, 0, 0] > image[8, -1, 0])
    assert abs(mirrored - expected) <= (25 if expected == 100 else 0)


def test_every_caption_comes_up():
    transform = TrainTransform(8, 8)
    found = [
        transform({"image": gradient(8, 8), "texts": ("a", "b", "c")}, np.random.default_rng(i))
        for i in range(300)
    ]
    counts = [sum(sample["text"] == letter for sample in found) for letter in "abc"]
    assert min(counts) > 70


def test_a_sample_with_one_text_keeps_it_and_the_rest():
    sample = {"image": gradient(8, 8), "text": "as it is", "facts": 7}
    for transform in (TrainTransform(4, 4), EvalTransform(4, 4)):
        result = transform(sample, np.random.default_rng(0))
        assert result["text"] == "as it is" and result["facts"] == 7
    assert sample["image"].shape == (8, 8, 3)


@pytest.mark.parametrize("shape", [(1, 1), (1, 500), (500, 1), (3, 7)])
def test_tiny_and_thin_pictures(shape):
    for seed in range(20):
        sample = {"image": gradient(*shape), "texts": ("a",)}
        image = TrainTransform(24, 16)(sample, np.random.default_rng(seed))["image"]
        assert image.shape == (24, 16, 3)


def test_impossible_options_are_refused():
    with pytest.raises(ValueError, match="min_keep"):
        TrainTransform(8, 8, min_keep=0)
    with pytest.raises(ValueError, match="flip"):
        TrainTransform(8, 8, flip=1.5)


@pytest.mark.parametrize("seed", range(12))
def test_size_place_and_mirroring_are_draws_of_their_own(seed):
    """Four draws, in this order: a run that goes on must find its crops as they were."""
    image = np.random.default_rng(99).integers(0, 256, (60, 90, 3), np.uint8)
    transform = TrainTransform(20, 24, min_keep=0.5, flip=0.4)
    found = transform({"image": image}, np.random.default_rng(seed))["image"]
    keep, x, y, mirror = np.random.default_rng(seed).random(4)
    width = (0.5 + 0.5 * keep) * 72  # of a box of 24 to 20 in 60 rows
    height = width * 20 / 24
    left, top = x * (90 - width), y * (60 - height)
    box = (left, top, left + width, min(top + height, 60))
    wanted = np.asarray(Image.fromarray(image).resize((24, 20), Image.Resampling.BICUBIC, box))
    np.testing.assert_array_equal(found, wanted[:, ::-1] if mirror < 0.4 else wanted)
