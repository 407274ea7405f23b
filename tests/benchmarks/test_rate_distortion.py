"""Rates and distortions: what leads, what lies between two points, and real files."""

import io

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from benchmarks import rate_distortion as rd


def point(size, psnr, **more):
    return {"codec": "A", "bytes": size, "psnr": psnr, **more}


def test_what_leads_has_no_other_that_is_smaller_and_better():
    points = [point(10, 20.0), point(20, 19.0), point(20, 25.0), point(40, 25.0), point(40, 30.0)]
    assert [(p["bytes"], p["psnr"]) for p in rd.best(points, "psnr")] == [
        (10, 20.0), (20, 25.0), (40, 30.0)
    ]  # fmt: skip
    # Of LPIPS less is better, and points without it do not count.
    points = [point(1, 0, lpips=0.5), point(2, 0, lpips=0.6), point(3, 0, lpips=0.1), point(0, 9)]
    assert [p["bytes"] for p in rd.best(points, "lpips")] == [1, 3]


def test_between_two_points_goes_by_the_logarithm_of_bytes():
    front = [point(100, 20.0), point(400, 30.0)]
    assert rd.at_bytes(front, 200, "psnr") == pytest.approx(25.0)
    assert rd.at_bytes(front, 99, "psnr") is None
    assert rd.bytes_for(front, 25.0, "psnr") == pytest.approx(200)
    assert rd.bytes_for(front, 31.0, "psnr") is None


def test_points_are_those_of_real_files(monkeypatch):
    monkeypatch.setattr(rd, "QUALITIES", (20, 90))
    monkeypatch.setattr(rd, "SCALES", (1, 2))
    noise = ndimage.gaussian_filter(np.random.default_rng(0).random((2, 32, 32, 3)), (0, 3, 3, 0))
    pictures = np.round(255 * (noise - noise.min()) / np.ptp(noise)).astype(np.uint8)
    options = rd.codecs()["JPEG"]
    points = rd.measure_codec("JPEG", options, pictures, None)
    assert len(points) == 8
    (fine,) = (p for p in points if (p["codec"], p["quality"], p["scale"]) == ("JPEG", 90, 1))
    files = []
    for picture in pictures:
        file = io.BytesIO()
        Image.fromarray(picture).save(file, quality=90, **options)
        files.append(file.getvalue())
    copies = np.stack([np.asarray(Image.open(io.BytesIO(data))) for data in files])
    error = np.mean((copies.astype(np.float64) - pictures) ** 2, axis=(1, 2, 3))
    assert fine["bytes"] == np.mean([len(data) for data in files])
    assert fine["psnr"] == pytest.approx(np.mean(10 * np.log10(255**2 / error)), rel=1e-4)
    bare = [p for p in points if p["codec"] == "JPEG without header"]
    assert all(p["bytes"] == p["scan_bytes"] for p in bare)
    ours = {**fine, "codec": "ours", "bytes": 400.0, "code_bytes": 365}
    rows = rd.table(points, ours, ["JPEG", "JPEG without header"]).splitlines()
    assert rows[-1].startswith("| tokenizer (365 bytes of bits) | 400 |")
    assert len({row.count("|") for row in rows}) == 1
