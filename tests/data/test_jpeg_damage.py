"""JPEG files with damaged blocks, which have all of their markers."""

import io
import random

import pytest
from PIL import Image

from instella_jax.data import jpeg_damage
from instella_jax.data.images import BadPicture
from instella_jax.preparing.import_report import report_lines
from instella_jax.preparing.importing import import_dataset
from tests.data.test_images import JPEGS, decode, encoded, scenery

SIZE = (256, 384)


@pytest.fixture
def simplejpeg():
    return pytest.importorskip("simplejpeg")


def jpeg(kind):
    image = scenery(*SIZE)
    return encoded(image[..., 0] if kind == "grey" else image, **JPEGS[kind])


def scan(data):
    """Where the coded blocks begin."""
    start = data.index(b"\xff\xda") + 2
    return start + int.from_bytes(data[start : start + 2])


def with_sector(data, fill, rng):
    """The file with 512 of its bytes lost, as disks lose them."""
    place = rng.randrange(scan(data), len(data) - 514)
    return data[:place] + fill + data[place + 512 :]


def is_noticed(data):
    """Whether an import would leave a file out."""
    try:
        decode(data)
    except BadPicture:
        return True
    return jpeg_damage.is_damaged(data)


@pytest.mark.parametrize("kind", JPEGS)
def test_most_lost_sectors_are_found(simplejpeg, kind):
    data, rng = jpeg(kind), random.Random(0)
    assert sum(is_noticed(with_sector(data, rng.randbytes(512), rng)) for _ in range(20)) >= 19
    # Of zeros Pillow notices nothing.
    lost = [with_sector(data, bytes(512), rng) for _ in range(40)]
    assert sum(map(jpeg_damage.is_damaged, lost)) >= 26
    for file in lost:
        decode(file)


@pytest.mark.parametrize("kind", JPEGS)
def test_whole_files_are_not_damaged(simplejpeg, kind):
    data = jpeg(kind)
    assert not jpeg_damage.is_damaged(data)
    # Without an end marker, with room behind it, and with padding before it.
    for other in (data[:-2], data[:-1], data + b"\0" * 999, data[:-2] + b"\0" * 64 + data[-2:]):
        assert not jpeg_damage.is_damaged(other)
    assert jpeg_damage.is_damaged(data[:-2] + random.Random(0).randbytes(64) + data[-2:])


def test_kinds_that_are_not_for_screens(simplejpeg):
    file = io.BytesIO()
    Image.fromarray(scenery(*SIZE)).convert("CMYK").save(file, "jpeg")
    assert not jpeg_damage.is_damaged(file.getvalue())
    assert jpeg_damage.is_damaged(with_sector(file.getvalue(), bytes(512), random.Random(1)))
    # What simplejpeg does not read is not damaged for that.
    deep = bytearray(jpeg("plain"))
    deep[deep.index(b"\xff\xc0") + 4] = 12  # bits of a colour
    assert not jpeg_damage.is_damaged(bytes(deep))


@pytest.fixture
def folder(tmp_path):
    """Five pictures with captions, of which 0.jpg and 1.jpg are damaged."""
    folder, rng = tmp_path / "in", random.Random(0)
    folder.mkdir()
    for number in range(5):
        data = jpeg("plain") if number < 4 else encoded(scenery(), "png")
        if number < 2:
            data = with_sector(data, bytes(512), rng)
        suffix = "jpg" if number < 4 else "png"
        (folder / f"{number}.{suffix}").write_bytes(data)
        (folder / f"{number}.txt").write_text("x")
    return folder


def test_an_import_leaves_them_out_and_counts_them(simplejpeg, folder, tmp_path):
    report = import_dataset(folder, tmp_path / "out")
    assert report["kept"] == 3 and report["dropped"] == {"damaged JPEG": 2}
    assert report["examples"] == {"damaged JPEG": ["0.jpg", "1.jpg"]} and not report["flaws"]


def test_without_the_library_an_import_says_what_it_could_not_check(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(jpeg_damage, "_library", lambda: None)
    report = import_dataset(folder, tmp_path / "out")
    assert report["kept"] == 5 and report["flaws"] == {jpeg_damage.NOT_CHECKED: 4}
    assert any("needs instella-jax[jpeg]: 4" in line for line in report_lines(report))
