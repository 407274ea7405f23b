"""The user's own pictures: real files of every awkward kind, written here with Pillow."""

import contextlib
import importlib
import io
import json
import logging
import struct
import zlib
from contextlib import closing

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image

from instella_jax.data.folder import FolderSource
from instella_jax.data.images import read_picture
from instella_jax.data.loader import make_loader
from instella_jax.data.samples import BadSample
from instella_jax.data.sources import make_split
from instella_jax.data.transforms import EvalTransform, TrainTransform
from instella_jax.errors import UserError
from instella_jax.preparing.importing import import_dataset

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def quarters(height=32, width=32):
    """A picture of four colours: red, green / blue, white. uint8 [height, width, 3]."""
    image = np.empty((height, width, 3), np.uint8)
    half, middle = height // 2, width // 2
    image[:half, :middle], image[:half, middle:] = RED, GREEN
    image[half:, :middle], image[half:, middle:] = BLUE, WHITE
    return image


def corners(image):
    """The colour a quarter in from each corner, in reading order."""
    rows, columns = (
        (image.shape[0] // 4, -image.shape[0] // 4),
        (
            image.shape[1] // 4,
            -image.shape[1] // 4,
        ),
    )
    return [tuple(map(int, image[r, c])) for r in rows for c in columns]


def close(left, right, tolerance=8):
    return np.abs(np.asarray(left, int) - np.asarray(right, int)).max() <= tolerance


def write_metadata(folder, rows):
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize(
    "suffix",
    [
        "png",
        "jpg",
        "webp",
        "bmp",
        "gif",
        "tif",
        "avif",
        "ppm",
        "jfif",
        "jpe",
        "pgm",
        "jp2",
        "j2k",
        "jpx",
        "qoi",
    ],
)
def test_formats(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    options = {"lossless": True} if suffix == "webp" else {}
    Image.fromarray(quarters()).save(path, **options)
    assert close(corners(read_picture(path)), [RED, GREEN, BLUE, WHITE])


@pytest.mark.parametrize(
    "orientation, expected",
    [  # EXIF 2.3: where row 0 and column 0 of the stored picture are to be shown
        (1, [RED, GREEN, BLUE, WHITE]),
        (2, [GREEN, RED, WHITE, BLUE]),  # row 0 top, column 0 right
        (3, [WHITE, BLUE, GREEN, RED]),  # bottom, right
        (4, [BLUE, WHITE, RED, GREEN]),  # bottom, left
        (5, [RED, BLUE, GREEN, WHITE]),  # left, top
        (6, [BLUE, RED, WHITE, GREEN]),  # right, top
        (7, [WHITE, GREEN, BLUE, RED]),  # right, bottom
        (8, [GREEN, WHITE, RED, BLUE]),  # left, bottom
    ],
)
@pytest.mark.parametrize("decode_side", [None, 16])
def test_exif_orientation(tmp_path, orientation, expected, decode_side):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "a.jpg"
    Image.fromarray(quarters(64, 96)).save(path, exif=exif, quality=95)
    image = read_picture(path, decode_side=decode_side)
    assert image.shape[0] < image.shape[1] if orientation < 5 else image.shape[0] > image.shape[1]
    assert close(corners(image), expected)


def test_transparency_is_shown_on_white(tmp_path):
    rgba = np.zeros((4, 8, 4), np.uint8)
    rgba[:, 4:] = (255, 0, 0, 255)
    rgba[0, 4:, 3] = 128
    for name in ("a.png", "a.webp"):
        Image.fromarray(rgba).save(tmp_path / name, **({"lossless": True} if "w" in name else {}))
        image = read_picture(tmp_path / name)
        assert (image[:, :4] == 255).all() and (image[1:, 4:] == RED).all()
        assert close(image[0, 4:], (255, 127, 127), 1)
    grey = Image.merge("LA", (Image.new("L", (4, 4), 0), Image.new("L", (4, 4), 51)))
    grey.save(tmp_path / "la.png")
    assert (read_picture(tmp_path / "la.png") == 204).all()


def test_a_palette_with_a_transparent_colour(tmp_path):
    palette = Image.new("P", (4, 2))
    palette.putpalette([0, 0, 0, 0, 0, 255])
    palette.putpixel((0, 0), 1)
    for name in ("a.gif", "a.png"):
        palette.save(tmp_path / name, transparency=0)
        image = read_picture(tmp_path / name)
        assert tuple(image[0, 0]) == BLUE and (image[1] == 255).all()
    palette.save(tmp_path / "opaque.png")
    assert (read_picture(tmp_path / "opaque.png")[1] == 0).all()


def test_grey_two_tone_and_a_grey_value_that_means_transparent(tmp_path):
    Image.new("L", (4, 4), 77).save(tmp_path / "l.png")
    assert (read_picture(tmp_path / "l.png") == 77).all()
    Image.new("1", (4, 4), 1).save(tmp_path / "1.png")
    assert (read_picture(tmp_path / "1.png") == 255).all()
    Image.new("L", (4, 4), 9).save(tmp_path / "t.png", transparency=9)
    assert (read_picture(tmp_path / "t.png") == 255).all()


def png(width, height, depth, color, rows):
    """A PNG by hand: `rows` are the raw scan lines."""

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row for row in rows))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        (chunk(b"IHDR", header), chunk(b"IDAT", data), chunk(b"IEND", b""))
    )


def test_sixteen_bits_keep_their_brightness(tmp_path):
    values = [0, 257, 0x8080, 65535]
    rows = [struct.pack(">4H", *values)]
    (tmp_path / "grey.png").write_bytes(png(4, 1, 16, 0, rows))
    assert read_picture(tmp_path / "grey.png")[0].tolist() == [[v] * 3 for v in (0, 1, 128, 255)]
    rows = [struct.pack(">3H", 65535, 0x8080, 0)]
    (tmp_path / "rgb.png").write_bytes(png(1, 1, 16, 2, rows))
    assert read_picture(tmp_path / "rgb.png")[0, 0].tolist() == [255, 128, 0]
    Image.fromarray(np.uint16([values])).save(tmp_path / "grey.tif")
    assert read_picture(tmp_path / "grey.tif")[0, :, 0].tolist() == [0, 1, 128, 255]
    Image.fromarray(np.float32([[0, 0.5, 1]])).save(tmp_path / "float.tif")
    assert read_picture(tmp_path / "float.tif")[0, :, 0].tolist() == [0, 128, 255]
    Image.fromarray(np.float32([[0, 0.5, 90]])).save(tmp_path / "wide.tif")
    with pytest.raises(BadSample, match="values outside"):
        read_picture(tmp_path / "wide.tif")


def test_cmyk(tmp_path):
    Image.fromarray(quarters()).convert("CMYK").save(tmp_path / "a.jpg", quality=95)
    assert close(corners(read_picture(tmp_path / "a.jpg")), [RED, GREEN, BLUE, WHITE])


def test_only_the_first_picture_of_an_animation(tmp_path):
    frames = [Image.new("RGB", (4, 4), color) for color in (RED, BLUE)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert (read_picture(tmp_path / "a.gif") == RED).all()


def test_large_jpegs_are_decoded_small_but_not_too_small(tmp_path):
    Image.fromarray(quarters(256, 512)).save(tmp_path / "a.jpg")
    assert read_picture(tmp_path / "a.jpg", decode_side=60).shape == (64, 128, 3)
    assert read_picture(tmp_path / "a.jpg", decode_side=65).shape == (128, 256, 3)
    assert read_picture(tmp_path / "a.jpg").shape == (256, 512, 3)


def broken_files(folder):
    """Write one good picture and files that are broken in many ways; return the bad names."""
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    for suffix in ("png", "jpg", "webp", "gif", "tif", "bmp"):
        buffer = io.BytesIO()
        Image.fromarray(noise).save(
            buffer, format={"jpg": "jpeg", "tif": "tiff"}.get(suffix, suffix)
        )
        data = buffer.getvalue()
        (folder / f"cut.{suffix}").write_bytes(data[: len(data) // 2])
        if suffix == "png":
            (folder / "flipped.png").write_bytes(data[:200] + bytes([data[200] ^ 255]) + data[201:])
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.jpg").write_text("not a picture")
    (folder / "bomb.png").write_bytes(png(30_000, 30_000, 1, 0, [b"\0"]))
    (folder / "large.png").write_bytes(png(10_000, 9_000, 1, 0, [b"\0"]))
    (folder / "script.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    (folder / "folder.png").mkdir()
    return {path.name for path in folder.iterdir()} - {"folder.png"}


def test_broken_files_are_skipped_and_named(tmp_path, caplog):
    bad = broken_files(tmp_path)
    assert len(bad) == 12
    for index in range(3):
        Image.fromarray(quarters()).save(tmp_path / f"good{index}.png")
    source = FolderSource(tmp_path, captions=False)
    assert len(source) == 15
    caplog.set_level(logging.WARNING)
    batches = list(
        make_loader(source, batch_size=3, seed=0, repeat=False, transform=EvalTransform(8, 8))
    )
    assert len(batches) == 1
    assert close(corners(batches[0]["image"][2]), [RED, GREEN, BLUE, WHITE])
    log = [record.getMessage() for record in caplog.records if "skipped" in record.getMessage()]
    assert len(log) == 12 and "(12 so far)" in log[-1]
    for name in bad:
        assert sum(f"/{name} " in line for line in log) == 1
    for name in ("bomb.png", "large.png"):
        assert any(f"{name} is refused" in line for line in log)


def test_a_lower_limit_of_pixels(tmp_path):
    Image.fromarray(quarters()).save(tmp_path / "a.png")
    with pytest.raises(BadSample, match="32x32 is over 1000 pixels"):
        read_picture(tmp_path / "a.png", max_pixels=1000)


def test_captions_from_metadata(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("a.png", "b.png", "sub/c.png"):
        Image.fromarray(quarters()).save(tmp_path / name)
    write_metadata(
        tmp_path,
        [
            {"file_name": "b.png", "text": " two words "},
            {"file_name": "sub/c.png", "text": ["one", "", "two"], "extra": 1},
        ],
    )
    (tmp_path / "a.txt").write_text("not read where there is metadata")
    source = FolderSource(tmp_path)
    assert [entry.name for entry in source.entries] == ["b.png", "sub/c.png"]
    assert [source[i]["texts"] for i in range(2)] == [("two words",), ("one", "two")]


def test_captions_from_text_files(tmp_path, caplog):
    (tmp_path / "sub").mkdir()
    (tmp_path / ".hidden").mkdir()
    for name in ("z.PNG", "a.png", "sub/c.png", "none.png", "._a.png", ".hidden/d.png"):
        Image.fromarray(quarters()).save(tmp_path / name, format="png")
    (tmp_path / "z.txt").write_text("\ufeffa cat\n\n on  a mat\n", encoding="utf-8")
    (tmp_path / "a.txt").write_text("Ein Käfer", encoding="utf-8")
    (tmp_path / "sub" / "c.txt").write_text("third")
    source = FolderSource(tmp_path)
    assert [(source.entries[i].name, source[i]["texts"]) for i in range(len(source))] == [
        ("a.png", ("Ein Käfer",)),
        ("sub/c.png", ("third",)),
        ("z.PNG", ("a cat", "on a mat")),
    ]
    assert "1 of 4 pictures have no caption" in caplog.text and "none.png" in caplog.text
    (tmp_path / "a.txt").write_text(" \n")
    with pytest.raises(BadSample, match=r"a\.txt is empty"):
        source[0]
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(BadSample, match=r"a\.txt"):
        source[0]


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"file_name": "../secret.png", "text": "x"}', "leads out of the folder"),
        ('{"file_name": "a/../../secret.png", "text": "x"}', "leads out of the folder"),
        ('{"file_name": "/etc/secret.png", "text": "x"}', "leads out of the folder"),
        ('{"file_name": "..\\\\secret.png", "text": "x"}', "leads out of the folder"),
        ('{"file_name": "a.png", "text": 3}', "not a caption or a list"),
        ('{"file_name": "a.png", "text": ["x", 3]}', "not a caption or a list"),
        ('{"file_name": "a.png", "text": {"en": "x"}}', "not a caption or a list"),
        ('{"text": "x"}', 'with "file_name"'),
        ('{"file_name": 7, "text": "x"}', 'with "file_name"'),
        ('["a.png", "x"]', 'with "file_name"'),
        ('{"file_name": "a.png", "text": "x"', "not JSON"),
        ('{"file_name": "a.png"}', "has no captions"),
        ('{"file_name": "a.png", "text": ["", " "]}', "has no captions"),
        ("", "has no pictures"),
    ],
)
def test_wrong_metadata_is_one_clear_sentence(tmp_path, line, message):
    Image.fromarray(quarters()).save(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text("\n" + line + "\n")
    with pytest.raises(UserError, match=message) as error:
        FolderSource(tmp_path)
    assert "\n" not in str(error.value)
    if "metadata" in str(error.value) and "line" in str(error.value):
        assert "line 2" in str(error.value)


def test_metadata_that_is_not_utf8(tmp_path):
    (tmp_path / "metadata.jsonl").write_bytes(b'{"file_name": "a.png", "text": "\xff"}\n')
    with pytest.raises(UserError, match="not UTF-8"):
        FolderSource(tmp_path)


def test_folders_that_cannot_be_used(tmp_path):
    with pytest.raises(UserError, match="is not a folder"):
        FolderSource(tmp_path / "missing")
    with pytest.raises(UserError, match="has no pictures"):
        FolderSource(tmp_path)
    Image.fromarray(quarters()).save(tmp_path / "a.png")
    with pytest.raises(UserError, match="has no captions"):
        FolderSource(tmp_path)
    with pytest.raises(UserError, match="has no captions"):
        make_loader(FolderSource(tmp_path), batch_size=1, seed=0)
    with pytest.raises(UserError, match="unknown split"):
        FolderSource(tmp_path, split="test", captions=False)
    assert FolderSource(tmp_path, captions=False)[0]["texts"] == ("",)


@pytest.mark.parametrize("name", ["tokenizer", "t2i_diffusion", "t2i_ar"])
@pytest.mark.parametrize("variant", ["", "instella_512"])
@pytest.mark.parametrize("kind", ["folder", "shards"])
def test_pictures_with_captions_are_not_mirrored(tmp_path, caplog, name, variant, kind):
    """Unless a user asks for it, who is told what it does."""
    (tmp_path / "in").mkdir()
    ramp = np.arange(0, 240, 5, dtype=np.uint8)[None, :, None].repeat(48, 0).repeat(3, 2)
    for index in range(4):
        Image.fromarray(ramp).save(tmp_path / "in" / f"{index}.png")
        (tmp_path / "in" / f"{index}.txt").write_text("dark to the left")
    import_dataset(tmp_path / "in", tmp_path / "shards")
    captions = name != "tokenizer"
    data = importlib.import_module(f"configs.{name}").get_config(variant).data
    data.update(kind=kind, workers=0, image_size=16)
    data[kind].update(path=str(tmp_path / ("in" if kind == "folder" else "shards")), heldout=0.25)

    def mirrored():
        caplog.clear()
        with closing(make_split(data, "train", captions=captions, batch_size=40)) as loader:
            image = next(loader)["image"].astype(int)
        told = any("left or right become wrong" in r.getMessage() for r in caplog.records)
        return int((image[:, 8, 0, 0] > image[:, 8, -1, 0]).sum()), told

    number, told = mirrored()
    assert (number == 0 if captions else 8 < number < 32) and not told
    data[kind].flip = 1.0
    assert mirrored() == (40, captions)


def test_of_many_broken_pictures_the_first_hundred_are_named(tmp_path, caplog):
    for index in range(130):
        (tmp_path / f"{index}.png").write_bytes(b"broken")
    with pytest.raises(UserError, match="samples in a row"):
        next(make_loader(FolderSource(tmp_path, captions=False), batch_size=1, seed=0))
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 101 and told[-1] == "what is skipped from here on is only counted"
    caplog.clear()
    assert not FolderSource(tmp_path, captions=False).sizes().any()
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 1 and "130 pictures have no size" in told[0]


def test_splits_are_disjoint_complete_and_by_picture(tmp_path):
    rows = [{"file_name": f"{i % 40}.png", "text": str(i)} for i in range(80)]
    write_metadata(tmp_path, rows)

    def names(**arguments):
        source = FolderSource(tmp_path, **arguments)
        return [entry.name for entry in source.entries]

    train, heldout = names(split="train", heldout=0.1), names(split="heldout", heldout=0.1)
    assert not set(train) & set(heldout) and sorted(train + heldout) == sorted(names())
    assert len(heldout) == 8 and len(set(heldout)) == 4
    assert names(split="heldout", heldout=0.1) == heldout
    assert len(names(split="heldout", heldout=0.001)) == 2


def test_training_on_a_folder_end_to_end(tmp_path):
    for index in range(6):
        Image.fromarray(quarters(20 + index, 40 - index)).save(tmp_path / f"{index}.png")
    write_metadata(
        tmp_path, [{"file_name": f"{i}.png", "text": [f"{i} a", f"{i} b"]} for i in range(6)]
    )
    source = FolderSource(tmp_path, decode_side=20)

    def read(workers):
        loader = make_loader(
            source, batch_size=6, seed=3, transform=TrainTransform(16, 24), workers=workers
        )
        batches = [next(loader) for _ in range(6)]
        loader.close()
        return batches

    batches = read(0)
    assert batches[0]["image"].shape == (6, 16, 24, 3)
    assert {text for batch in batches for text in batch["text"]} == {
        f"{i} {letter}" for i in range(6) for letter in "ab"
    }
    for one, two in zip(batches, read(0), strict=True):
        np.testing.assert_array_equal(one["image"], two["image"])
        assert one["text"] == two["text"]
    again = [
        {text[0]: image for text, image in zip(b["text"], b["image"], strict=True)}
        for b in batches[:2]
    ]
    assert any((again[0][name] != again[1][name]).any() for name in again[0])


@pytest.mark.parametrize("reader", [FolderSource.sizes, lambda source: source[0]])
def test_a_format_that_runs_another_program_is_never_opened(tmp_path, monkeypatch, reader):
    opened = []
    monkeypatch.setattr(EpsImagePlugin.EpsImageFile, "load", lambda *args, **_: opened.append(args))
    monkeypatch.setattr(EpsImagePlugin.EpsImageFile, "_open", lambda *args: opened.append(args))
    Image.new("RGB", (8, 8)).save(tmp_path / "a.eps")
    (tmp_path / "a.eps").rename(tmp_path / "a.png")
    source = FolderSource(tmp_path, captions=False)
    with contextlib.suppress(BadSample):
        assert not np.any(reader(source))
    assert not opened
