import json

import numpy as np
import pytest
from PIL import Image
from scipy import linalg

from instella_jax.errors import UserError
from instella_jax.evaluation import feature_sets, picture_sets
from instella_jax.evaluation.frechet import Statistics, frechet_distance, precision_recall


def features(count, width=12, seed=0, shift=0.0):
    rng = np.random.default_rng(seed)
    mix = np.random.default_rng(99).normal(size=(width, width))
    return (rng.normal(size=(count, width)) @ mix + shift).astype(np.float32)


def statistics(rows, size=7):
    found = Statistics.empty(rows.shape[1])
    for start in range(0, len(rows), size):
        found.add(rows[start : start + size])
    return found


def by_scipy(a, b):
    """The published formula with scipy's root of the product."""
    means = a.astype(np.float64).mean(0), b.astype(np.float64).mean(0)
    ca, cb = np.cov(a.astype(np.float64), rowvar=False), np.cov(b.astype(np.float64), rowvar=False)
    root = linalg.sqrtm(ca @ cb)
    return np.sum((means[0] - means[1]) ** 2) + np.trace(ca + cb - 2 * np.real(root))


def test_statistics_are_those_of_all_at_once():
    rows = features(200) + 1e4  # far from 0, where sums of squares would lose digits
    found = statistics(rows)
    np.testing.assert_allclose(found.mean, rows.astype(np.float64).mean(0), rtol=1e-13)
    expected = np.cov(rows.astype(np.float64), rowvar=False)
    np.testing.assert_allclose(found.covariance, expected, rtol=1e-9)
    half, other = statistics(rows[:30]), statistics(rows[30:])
    half.merge(other)
    np.testing.assert_allclose(half.covariance, expected, rtol=1e-9)
    with pytest.raises(UserError, match="at least 2"):
        statistics(rows[:1]).covariance  # noqa: B018


@pytest.mark.parametrize("counts", [(300, 200), (300, 8), (5, 6)])
def test_frechet_distance_is_that_of_scipy(counts):
    a, b = features(counts[0]), features(counts[1], seed=1, shift=0.5)
    found = frechet_distance(statistics(a), statistics(b))
    # The root of a matrix without full rank is inexact in scipy.
    tolerance = 1e-8 if min(counts) > 12 else 1e-4
    assert found == pytest.approx(by_scipy(a, b), rel=tolerance)


def test_frechet_distance_by_hand():
    eye = np.eye(3)
    a, b = Statistics(11, np.zeros(3), 10 * eye), Statistics(21, np.ones(3), 20 * 4 * eye)
    # Means 3 apart in squares, deviations 1 and 2: 3 + 3 (1 + 4 - 2 * 2).
    assert frechet_distance(a, b) == pytest.approx(6)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-12)


def by_loops(real, generated, nearest):
    def inside(points, others):
        radii = [sorted(np.linalg.norm(o - x) for x in others)[nearest] for o in others]
        pairs = zip(others, radii, strict=True)
        balls = list(pairs)
        return np.mean([any(np.linalg.norm(p - o) <= r for o, r in balls) for p in points])

    return inside(generated, real), inside(real, generated)


def test_precision_and_recall_are_those_of_loops():
    real, generated = features(60, 3), features(50, 3, seed=1, shift=0.8) * 0.8
    found = precision_recall(real, generated)
    np.testing.assert_allclose(found, by_loops(real, generated, 3))
    assert 0 < found[0] < 1 and 0 < found[1] < 1
    assert precision_recall(real, real) == (1, 1)
    assert precision_recall(real, real + 1e3) == (0, 0)
    with pytest.raises(UserError, match="more than 3 pictures"):
        precision_recall(real[:3], generated)


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def test_tf1_resize_by_the_formula():
    image = noise(7, 5, 3)
    found = picture_sets.tf1_resize(image, 11)
    for row in range(11):
        for column in range(11):
            y, x = row * 7 / 11, column * 5 / 11
            i, j = int(y), int(x)
            v, u = y - i, x - j
            k, m = min(i + 1, 6), min(j + 1, 4)
            p = image.astype(float)
            upper = p[i, j] * (1 - u) + p[i, m] * u
            lower = p[k, j] * (1 - u) + p[k, m] * u
            np.testing.assert_allclose(found[row, column], upper * (1 - v) + lower * v, atol=1e-3)


def test_clean_resize_is_antialiased_and_not_rounded():
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    assert np.ptp(picture_sets.clean_resize(stripes, 16)[4:-4, 4:-4]) < 10
    assert picture_sets.tf1_resize(stripes, 16).min() == 255  # every fourth column alone
    assert picture_sets.tf1_resize(stripes, 16).min() == 255  # every fourth column alone
    found = picture_sets.clean_resize(noise(40, 30, 3), 17)
    assert found.dtype == np.float32 and found.min() >= 0 and found.max() <= 255
    assert np.abs(found - np.round(found)).max() > 0.2


def folder_of(path, count=9, side=24, seed=0):
    path.mkdir()
    for number in range(count):
        Image.fromarray(noise(side + number % 3, side, 3, seed=seed + number)).save(
            path / f"{number}.png"
        )
    return path


@pytest.fixture
def means():
    """Features that anyone can compute: means of the quarters' colours."""

    def apply(params, images):
        return images.reshape(len(images), 2, 4, 2, 4, 3).mean((2, 4)).reshape(len(images), -1)

    def prepare(image):
        return picture_sets.clean_resize(image, 8)

    settings = {"features": "means", "weights": "none"}
    return feature_sets.Extractor("means", 12, prepare, apply, np.zeros(8), settings)


def expected(pictures, means):
    rows = [means.prepare(pictures.read(i)) for i in range(len(pictures))]
    return np.asarray(means.apply(None, np.stack(rows)))


def test_features_of_a_folder_over_eight_devices(tmp_path, means):
    pictures = picture_sets.open_pictures(folder_of(tmp_path / "a", 9))
    found = feature_sets.measure(pictures, means, keep=True, batch_size=4)
    np.testing.assert_allclose(found.features, expected(pictures, means), rtol=1e-5)
    assert found.statistics.count == 9
    covariance = np.cov(expected(pictures, means).astype(np.float64), rowvar=False)
    np.testing.assert_allclose(found.statistics.covariance, covariance, rtol=1e-4, atol=1e-3)


def test_statistics_are_kept_by_pictures_and_settings(tmp_path, means):
    folder, cache = folder_of(tmp_path / "a"), tmp_path / "cache"
    calls = []

    def measure(extractor=means, keep=False, crop=0):
        pictures = picture_sets.open_pictures(folder)
        pictures = picture_sets.center_crop(pictures, crop) if crop else pictures
        before = len(calls)
        found = feature_sets.measure(
            pictures, extractor, keep=keep, cache=cache, show=lambda *done: calls.append(done)
        )
        return found, len(calls) > before

    first, made = measure()
    again, made_again = measure()
    assert made and not made_again
    np.testing.assert_array_equal(first.statistics.scatter, again.statistics.scatter)
    assert measure(keep=True)[1] and not measure(keep=True)[1]
    other = feature_sets.Extractor(
        "means", 12, means.prepare, means.apply, means.params, {**means.settings, "weights": "x"}
    )
    assert measure(other)[1] and measure(crop=16)[1] and measure(crop=12)[1]
    (folder / "0.png").unlink()
    shrunk, made = measure()
    assert made and shrunk.statistics.count == 8
    for path in cache.iterdir():
        path.write_bytes(path.read_bytes()[:-40])
    assert measure()[1]


def test_numbers_are_pictures_too(tmp_path, means):
    images = noise(6, 16, 16, 3)
    np.savez(tmp_path / "s.npz", images)
    pictures = picture_sets.open_pictures(tmp_path / "s.npz")
    assert len(pictures) == 6
    np.testing.assert_array_equal(pictures.read(4), images[4])
    np.savez(tmp_path / "bad.npz", images.astype(np.float32))
    with pytest.raises(UserError, match="expected uint8"):
        picture_sets.open_pictures(tmp_path / "bad.npz")
    (tmp_path / "bad.npz").write_bytes((tmp_path / "s.npz").read_bytes()[:-99])
    with pytest.raises(UserError, match="cannot be read as .npz"):
        picture_sets.open_pictures(tmp_path / "bad.npz")
    (tmp_path / "empty").mkdir()
    for path, sentence in (("empty", "no pictures"), ("nowhere", "no folder of pictures")):
        with pytest.raises(UserError, match=sentence):
            picture_sets.open_pictures(tmp_path / path)


def test_grids_of_samples_are_no_samples_and_broken_files_are_told(tmp_path, caplog):
    folder = folder_of(tmp_path / "a", 3)
    (folder / "0.png").rename(folder / "grid-00000.png")
    assert len(picture_sets.open_pictures(folder)) == 3  # a name like any other
    (folder / "metadata.jsonl").touch()
    assert len(picture_sets.open_pictures(folder)) == 2
    assert "1 grid(s) of samples" in caplog.text
    (folder / "1.png").write_bytes(b"x" * 100)
    with pytest.raises(UserError, match="1.png cannot be read"):
        picture_sets.open_pictures(folder).read(0)


def test_crops_are_the_largest_square_of_the_centre(tmp_path):
    image = noise(30, 50, 3)
    pictures = picture_sets.PictureSet([("x",)], lambda i: image)
    np.testing.assert_array_equal(picture_sets.center_crop(pictures, 30).read(0), image[:, 10:40])
    np.testing.assert_array_equal(
        picture_sets.center_crop(pictures, 30, "lanczos").read(0), image[:, 10:40]
    )
    smaller = picture_sets.center_crop(pictures, 10, "lanczos").read(0)
    by_pillow = Image.fromarray(image[:, 10:40]).resize((10, 10), Image.Resampling.LANCZOS)
    np.testing.assert_array_equal(smaller, np.asarray(by_pillow))


TWO_PROCESSES = """
import os, sys, json
import jax
import numpy as np
address, number, folder = sys.argv[1], int(sys.argv[2]), sys.argv[3]
jax.distributed.initialize(address, 2, number)
from pathlib import Path
from instella_jax.evaluation import feature_sets, picture_sets
def apply(params, images):
    return images.reshape(len(images), 2, 4, 2, 4, 3).mean((2, 4)).reshape(len(images), -1)
means = feature_sets.Extractor("means", 12, lambda i: picture_sets.clean_resize(i, 8), apply,
                               np.zeros(8), {})
pictures = picture_sets.open_pictures(Path(folder))
found = feature_sets.measure(pictures, means, keep=True, batch_size=2)
if number == 0:
    print(json.dumps([found.statistics.count, found.statistics.scatter.tolist(),
                      found.features.tolist()]))
"""


@pytest.mark.slow
def test_two_processes_measure_what_one_does(tmp_path, means):
    import socket
    import subprocess
    import sys

    from tests.paths import ROOT

    folder = folder_of(tmp_path / "a", 9)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    started = [
        subprocess.Popen(
            [sys.executable, "-c", TWO_PROCESSES, address, str(n), str(folder)],
            stdout=subprocess.PIPE,
            cwd=ROOT,
            text=True,
        )
        for n in range(2)
    ]
    outputs = [process.communicate(timeout=200)[0] for process in started]
    count, scatter, rows = json.loads(outputs[0].splitlines()[-1])
    pictures = picture_sets.open_pictures(folder)
    whole = feature_sets.measure(pictures, means, keep=True)
    assert count == 9
    np.testing.assert_allclose(scatter, whole.statistics.scatter, rtol=1e-10, atol=1e-6)
    order = np.r_[0:9:2, 1:9:2]
    np.testing.assert_allclose(rows, whole.features[order], rtol=1e-6)
