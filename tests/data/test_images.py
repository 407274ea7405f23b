"""Picture files of every kind, written by the libraries that write them for real."""

import io
import logging
import struct
import sys
import warnings

import numpy as np
import pytest
from PIL import Image, ImageCms

from instella_jax.data import images
from instella_jax.data.images import BadPicture, decode_picture, read_picture, read_size
from instella_jax.preparing.filters import Filters
from instella_jax.preparing.import_report import report_lines
from instella_jax.preparing.importing import import_dataset

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def scenery(height=96, width=128):
    """Smooth colours with some noise, as photographs have. uint8 [height, width, 3]."""
    x = np.linspace(0, 7, width)[None, :, None] + np.linspace(0, 3, height)[:, None, None]
    noise = np.random.default_rng(0).normal(0, 9, (height, width, 3))
    return np.clip(128 + 90 * np.sin(x + [0, 1, 2]) + noise, 0, 255).astype(np.uint8)


def encoded(array, kind="jpeg", **options):
    file = io.BytesIO()
    Image.fromarray(array).save(file, kind, **options)
    return file.getvalue()


def decode(data, **options):
    return decode_picture(io.BytesIO(data), "it", **options)


# EXIF 2.3: what is seen of red, green / blue, white in reading order.
ORIENTATIONS = {
    1: [RED, GREEN, BLUE, WHITE], 2: [GREEN, RED, WHITE, BLUE], 3: [WHITE, BLUE, GREEN, RED],
    4: [BLUE, WHITE, RED, GREEN], 5: [RED, BLUE, GREEN, WHITE], 6: [BLUE, RED, WHITE, GREEN],
    7: [WHITE, GREEN, BLUE, RED], 8: [GREEN, WHITE, RED, BLUE],
}  # fmt: skip


@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "tiff", "avif", "heif"])
def test_turned_pictures_are_upright_and_of_the_size_that_is_told(tmp_path, kind, orientation):
    if kind == "heif":
        pytest.importorskip("pillow_heif").register_heif_opener()
    image = np.empty((64, 96, 3), np.uint8)
    image[:32, :48], image[:32, 48:], image[32:, :48], image[32:, 48:] = RED, GREEN, BLUE, WHITE
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a.{kind}"
    Image.fromarray(image).save(path, kind, exif=exif, quality=95)
    shown = read_picture(path)
    height, width = shown.shape[:2]
    assert read_size(path, "it") == (width, height)
    if kind == "heif":  # pillow-heif writes the entry, but no turn, which is what counts in HEIF
        assert shown.shape == image.shape
        return
    assert (width, height) == ((96, 64) if orientation < 5 else (64, 96))
    found = shown[height // 4 :: height // 2, width // 4 :: width // 2].reshape(4, 3)
    assert np.abs(found.astype(int) - ORIENTATIONS[orientation]).max() < 25


def test_heif_is_read_with_its_library_and_named_without(tmp_path, monkeypatch):
    pytest.importorskip("pillow_heif").register_heif_opener()
    data = encoded(scenery(), "heif", quality=95)
    assert np.abs(decode(data).astype(int) - scenery()).mean() < 6
    (tmp_path / "a.HEIC").write_bytes(data)
    (tmp_path / "b.png").write_bytes(encoded(scenery(), "png"))
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    images._formats.cache_clear()
    try:
        with pytest.raises(BadPicture, match=r"pip install 'instella-jax\[heif\]'"):
            decode(data)
        for name in "ab":
            (tmp_path / f"{name}.txt").write_text("x")
        report = import_dataset(tmp_path, tmp_path / "out")
    finally:
        images._formats.cache_clear()
    assert report["kept"] == 1 and report["dropped"] == {"HEIF, which needs instella-jax[heif]": 1}


def profile(space, tags):
    """A version 2 ICC display profile by hand (ICC.1:2001-04)."""
    body, table = b"", b""
    start = 128 + 4 + 12 * len(tags)
    for name, content in tags.items():
        table += name + struct.pack(">II", start + len(body), len(content))
        body += content + bytes(-len(content) % 4)
    connection = b"Lab " if space == b"CMYK" else b"XYZ "
    kind = b"prtr" if space == b"CMYK" else b"mntr"
    head = struct.pack(
        ">I4sI4s4s4s12x4s4s", start + len(body), bytes(4), 0x02100000, kind, space, connection,
        b"acsp", bytes(4),
    )  # fmt: skip
    head += bytes(68 - len(head)) + struct.pack(">3i", *(round(v * 65536) for v in D50))
    return head.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body


D50 = (0.9642, 1.0, 0.8249)
GAMMA = 2 + 51 / 256  # AdobeRGB (1998), section 4.3.4.2
ADOBE = [[0.60974, 0.20528, 0.14919], [0.31111, 0.62567, 0.06322], [0.01947, 0.06087, 0.74457]]
SRGB = [[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.71410]]


def xyz(values):
    return b"XYZ " + bytes(4) + struct.pack(">3i", *(round(v * 65536) for v in values))


def adobe_like(matrix=ADOBE, gamma=GAMMA):
    columns = dict(zip((b"rXYZ", b"gXYZ", b"bXYZ"), map(xyz, np.transpose(matrix)), strict=True))
    curve = b"curv" + bytes(4) + struct.pack(">IH", 1, round(gamma * 256))
    text = b"desc" + bytes(4) + struct.pack(">I", 5) + b"test\0" + bytes(78)
    curves = dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve)
    return profile(b"RGB ", {b"desc": text, b"wtpt": xyz(D50), **columns, **curves})


def srgb_of_xyz(values):
    """IEC 61966-2-1, for XYZ relative to D50. [..., 3] -> [..., 3] in [0, 255]."""
    linear = np.clip(values @ np.linalg.inv(SRGB).T, 0, 1)
    return 255 * np.where(linear < 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def srgb_of_adobe(image):
    return srgb_of_xyz((image / 255) ** GAMMA @ np.transpose(ADOBE))


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp", "tiff"])
def test_colours_are_those_that_the_profile_means(kind):
    image = scenery()
    options = {"icc_profile": adobe_like(), "quality": 100, "lossless": True}
    data = encoded(image, kind, **options)
    with Image.open(io.BytesIO(data)) as plain:
        stored = np.asarray(plain.convert("RGB"))
    expected = srgb_of_adobe(stored)
    assert np.abs(expected - stored).mean() > 5
    assert np.abs(decode(data) - expected).max() < 2.5
    small = decode(data, decode_side=48)
    assert np.abs(small.mean((0, 1)) - expected.mean((0, 1))).max() < 1


def test_transparency_palettes_and_turned_pictures_have_profiles_too():
    image = np.dstack([scenery(), np.full((96, 128), 255, np.uint8)])
    image[:10, :, 3] = 0
    expected = np.where(image[..., 3:] > 0, srgb_of_adobe(image[..., :3]), 255)
    exif = Image.Exif()
    exif[0x0112] = 6
    shown = decode(encoded(image, "png", icc_profile=adobe_like(), exif=exif))
    assert np.abs(shown - np.rot90(expected, -1)).max() < 2.5
    file = io.BytesIO()
    palette = Image.fromarray(scenery()).quantize(64)
    palette.save(file, "png", icc_profile=adobe_like())
    expected = srgb_of_adobe(np.asarray(palette.convert("RGB")))
    assert np.abs(decode(file.getvalue()) - expected).max() < 2.5
    # Grey under a profile for RGB stays grey, with the profile's tone.
    grey = np.arange(256, dtype=np.uint8)[None].repeat(8, 0)
    shown = decode(encoded(grey, "png", icc_profile=adobe_like(gamma=1.0)))
    expected = srgb_of_xyz((grey[..., None] / 255) * np.sum(SRGB, 1))
    assert np.abs(shown - expected).max() < 2.5


def test_cmyk_with_a_profile():
    """Of an ink table by hand: every combination of full inks has a colour of its own in Lab."""
    generator = np.random.default_rng(0)
    lab = np.column_stack([generator.uniform(45, 70, 16), generator.uniform(-12, 12, (16, 2))])
    lab[0] = (100, 0, 0)
    lab[15] = (0, 0, 0)  # all inks: the black point, which stays where it is
    # lut8Type: L in 0 to 255 for 0 to 100, a and b with 128 added; the last ink runs fastest.
    nodes = np.round(lab * [2.55, 1, 1] + [0, 128, 128]).astype(np.uint8)
    lab = (nodes - np.array([0.0, 128, 128])) / [2.55, 1, 1]
    ramp = bytes(range(256))
    table = (
        b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + struct.pack(">9i", *np.eye(3, dtype=int).ravel()
        * 65536) + ramp * 4 + nodes.tobytes() + ramp * 3
    )  # fmt: skip
    inks = profile(b"CMYK", {b"wtpt": xyz(D50), b"A2B0": table})
    file = io.BytesIO()
    corners = np.array([[i >> 3 & 1, i >> 2 & 1, i >> 1 & 1, i & 1] for i in range(16)], np.uint8)
    cmyk = (corners * 255)[None].repeat(16, 1).repeat(16, 0)
    Image.fromarray(cmyk, "CMYK").save(file, "tiff", icc_profile=inks)
    f = (lab[:, :1] + 16) / 116 + np.stack([lab[:, 1] / 500, 0 * lab[:, 1], -lab[:, 2] / 200], 1)
    linear = np.where(f > 6 / 29, f**3, 3 * (6 / 29) ** 2 * (f - 4 / 29))
    expected = srgb_of_xyz(linear * D50)
    assert np.abs(decode(file.getvalue())[0, ::16] - expected).max() < 3
    file = io.BytesIO()
    Image.fromarray(cmyk, "CMYK").save(file, "jpeg", icc_profile=inks, quality=100)
    assert np.abs(decode(file.getvalue())[8, 8::16] - expected).max() < 12


def test_srgb_itself_is_no_work(monkeypatch):
    data = encoded(scenery(), icc_profile=ImageCms.ImageCmsProfile(
        ImageCms.createProfile("sRGB")).tobytes(), quality=90)  # fmt: skip
    plain = decode(encoded(scenery(), quality=90))
    decode(data)
    monkeypatch.setattr(ImageCms, "applyTransform", None)
    np.testing.assert_array_equal(decode(data), plain)


@pytest.mark.parametrize(
    "broken",
    [b"no profile", adobe_like()[:300], profile(b"GRAY", {b"wtpt": xyz(D50)}), adobe_like()[:128]],
)
def test_a_broken_profile_is_told_once_and_counted(tmp_path, broken, caplog):
    images.log_flaw.cache_clear()
    data = encoded(scenery(), "png", icc_profile=broken)
    for _ in range(3):
        np.testing.assert_array_equal(decode(data), scenery())
    told = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert told == ["pictures with a broken colour profile are kept as they are"]
    for index in range(7):
        (tmp_path / f"{index}.png").write_bytes(data if index else encoded(scenery(), "png"))
        (tmp_path / f"{index}.txt").write_text("x")
    report = import_dataset(tmp_path, tmp_path / "out")
    assert report["kept"] == 7 and report["flaws"] == {"broken colour profile": 6}
    assert (
        "  kept as it is, broken colour profile: 6 (1.png, 2.png, 3.png, 4.png, 5.png, ...)"
        in report_lines(report)
    )


JPEGS = {
    "plain": {"quality": 90},
    "tables": {"quality": 75, "optimize": True},
    "progressive": {"quality": 92, "progressive": True},
    "restarts": {"quality": 85, "restart_marker_blocks": 4},
    "grey": {"quality": 85},
}


def jpeg(kind):
    return encoded(scenery()[..., 0] if kind == "grey" else scenery(), **JPEGS[kind])


@pytest.mark.parametrize("kind", JPEGS)
@pytest.mark.parametrize("decode_side", [None, 32])
def test_a_jpeg_without_its_end_marker_is_read(kind, decode_side):
    data = jpeg(kind)
    assert data[-2:] == b"\xff\xd9"
    expected = decode(data, decode_side=decode_side)
    for short in (data[:-1], data[:-2]):
        np.testing.assert_array_equal(decode(short, decode_side=decode_side), expected)
    longer = data + b"\0" * 5000  # as cameras write them
    np.testing.assert_array_equal(decode(longer, decode_side=decode_side), expected)


@pytest.mark.parametrize("kind", JPEGS)
def test_a_jpeg_without_its_last_blocks_is_refused(kind):
    data = jpeg(kind)
    for part in (0.25, 0.5, 0.75, 0.9, 0.98, 0.99):
        cut = data[: int(part * len(data))]
        unfinished = [bytes([fill]) * (len(data) - len(cut)) for fill in (0, 32, 255)]
        for rest in (
            b"",
            b"<html>404</html>" * 500,
            *unfinished,
        ):  # downloads are made room for before they arrive
            with pytest.raises(BadPicture, match="cannot be read"):
                decode(cut + rest)


def test_a_progressive_jpeg_without_its_last_scans_is_refused():
    data = jpeg("progressive")
    scans = [i for i in range(len(data) - 1) if data[i : i + 2] == b"\xff\xda"]
    assert len(scans) > 5
    for scan in scans[1:]:
        # Up to the tables of the scan, which come before it.
        tables = data.rfind(b"\xff\xc4", scans[0], scan)
        last = max(s for s in scans if s < scan)
        with pytest.raises(BadPicture):
            decode(data[: tables if tables > last else scan])


def test_nothing_is_warned_of(tmp_path):
    """What Pillow warns of is an error in these tests."""
    bomb = io.BytesIO()
    Image.new("1", (10_000, 9_000)).save(bomb, "png")
    exif = b"Exif\0\0MM\0\x2a\0\0\0\x08\0\x01\x01\x0f\0\x02\0\0\xff\0\0\0\0\x40"  # points nowhere
    corrupt = encoded(scenery(), exif=exif)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        with Image.open(io.BytesIO(corrupt)) as image:
            image.getexif()
        Image.open(io.BytesIO(bomb.getvalue())).close()
    assert len(told) > 1
    assert decode(corrupt).shape == (96, 128, 3)
    with pytest.raises(BadPicture, match="over 89478485 pixels") as error:
        decode(bomb.getvalue())
    assert error.value.reason == "too many pixels"
    assert read_size(io.BytesIO(bomb.getvalue()), "it") == (10_000, 9_000)
    (tmp_path / "a.png").write_bytes(bomb.getvalue())
    (tmp_path / "b.jpg").write_bytes(corrupt)
    report = import_dataset(tmp_path, tmp_path / "out", filters=Filters(captions=False))
    assert report["dropped"] == {"too many pixels": 1} and report["kept"] == 1


def test_deep_grey_keeps_its_levels():
    deep = np.array([[0, 257, 32768, 65535]] * 2, np.uint16)
    seen = decode(encoded(deep, "png"))
    np.testing.assert_array_equal(seen[0], np.array([[0], [1], [128], [255]]).repeat(3, 1))
    shares = np.array([[0.0, 0.2, 0.5, 1.0]] * 2, np.float32)
    seen = decode(encoded(shares, "tiff"))
    np.testing.assert_array_equal(seen[0], np.array([[0], [51], [128], [255]]).repeat(3, 1))


@pytest.mark.parametrize("values", [[0.0, 1.01], [-0.01, 1.0], [np.nan, 0.5]])
def test_numbers_that_are_no_shares_of_white_are_refused(values):
    with pytest.raises(BadPicture, match=r"outside \[0, 1.0\]"):
        decode(encoded(np.array([values] * 2, np.float32), "tiff"))
