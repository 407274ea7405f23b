"""Files of pictures to files of bits and back: names, refusals, metadata, altered files."""

import errno
import os
from functools import partial

import numpy as np
import pytest
from PIL import Image

from instella_jax import BinaryTokenizer
from instella_jax.codec import files
from instella_jax.codec.files import decode_files, encode_files
from instella_jax.codec.format import CodeFile
from instella_jax.codec.pictures import Decoding, Encoding
from instella_jax.errors import UserError
from tests.codec.alterations import alter, sealed


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer_folder):
    return BinaryTokenizer.from_pretrained(tiny_tokenizer_folder, batch_size=8)


def save(path, height=30, width=40, seed=0, **options):
    rng = np.random.default_rng(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).save(path, **options)
    return path


def size_of(path):
    with Image.open(path) as image:
        return image.size


def test_folders_are_made_again_and_sizes_come_back(tokenizer, tmp_path):
    sizes = {}
    for number in range(21):
        name = f"pictures/{'deep/' if number % 2 else ''}{number}.png"
        sizes[name] = (20 + number, 50 - number)
        save(tmp_path / name, *sizes[name], seed=number)
    (tmp_path / "pictures/notes.txt").write_text("no picture")
    report = encode_files(tokenizer, [tmp_path / "pictures"], tmp_path / "codes", Encoding())
    assert len(report.files) == 21 and not report.refused
    back = decode_files(tokenizer, [tmp_path / "codes"], tmp_path / "back", Decoding())
    assert len(back.files) == 21 and not back.refused
    for name, (height, width) in sizes.items():
        path = tmp_path / "back" / name.removeprefix("pictures/")
        assert size_of(path) == (width, height)
        code = CodeFile.from_bytes(path_of_code(tmp_path, name).read_bytes())
        with Image.open(tmp_path / name) as original:
            # Each file has the code of its own picture, whatever batch it was in.
            alone = tokenizer.encode(tokenizer.fit(original))
        assert np.mean(code.codes[0] != alone) < 0.05


def path_of_code(tmp_path, name):
    return (tmp_path / "codes" / name.removeprefix("pictures/")).with_suffix(".b1d")


def test_the_report_is_in_the_order_of_the_inputs(tokenizer, tmp_path, monkeypatch):
    stream = files.stream
    # As where batches of another shape are full before those of the first.
    monkeypatch.setattr(files, "stream", lambda *a, **o: reversed(list(stream(*a, **o))))
    inputs = [save(tmp_path / f"{name}.png") for name in "cab"]
    report = encode_files(tokenizer, inputs, tmp_path / "codes", Encoding())
    assert [record["file"] for record in report.files] == [str(path) for path in inputs]


def test_tiles_decode_to_the_whole(tokenizer, tmp_path):
    save(tmp_path / "a.png", 70, 100)
    for overlap in (0, 8):
        encoding, out = Encoding(tile=32, overlap=overlap), tmp_path / f"codes{overlap}"
        report = encode_files(tokenizer, [tmp_path / "a.png"], out, encoding)
        assert report.files[0]["tiles"] == 6
        decode_files(tokenizer, [out], out, Decoding())
        data = (out / "a.b1d").read_bytes()
        with Image.open(out / "a.png") as image:
            difference = np.asarray(image).astype(int) - tokenizer.from_bytes(data)
        assert np.abs(difference).max() <= 2
        decode_files(tokenizer, [out / "a.b1d"], out / "small", Decoding(size=50))
        assert size_of(out / "small/a.png") == (50, 35)


def test_what_cannot_be_read_is_refused_by_name_and_the_others_go_on(tokenizer, tmp_path):
    good, turned = save(tmp_path / "good.png"), save(tmp_path / "turned.jpg", 30, 40)
    (tmp_path / "broken.png").write_bytes(good.read_bytes()[:99])
    told = []
    inputs = [tmp_path / name for name in ("broken.png", "good.png", "gone.png", "turned.jpg")]
    report = encode_files(tokenizer, inputs, tmp_path / "out", Encoding(), tell=told.append)
    assert [record["file"] for record in report.files] == [str(good), str(turned)]
    assert sorted(refused["file"] for refused in report.refused) == [
        str(tmp_path / "broken.png"), str(tmp_path / "gone.png"),
    ]  # fmt: skip
    assert len(told) == 2 and all(str(tmp_path) in line for line in told)


def test_a_full_disk_ends_the_work_and_is_no_refusal(tokenizer, tmp_path, monkeypatch):
    inputs = [save(tmp_path / f"{number}.png", seed=number) for number in range(3)]

    def write(path, data, full=errno.ENOSPC):
        raise OSError(full, os.strerror(full), str(path))

    monkeypatch.setattr(files, "write_bytes", write)
    with pytest.raises(OSError, match="No space left"):
        encode_files(tokenizer, inputs, tmp_path / "out", Encoding())
    monkeypatch.setattr(files, "write_bytes", partial(write, full=errno.ENAMETOOLONG))
    report = encode_files(tokenizer, inputs, tmp_path / "out", Encoding())
    assert not report.files and len(report.refused) == 3


def test_nothing_is_overwritten_unless_it_is_asked_for(tokenizer, tmp_path):
    save(tmp_path / "a.png")
    out = tmp_path / "out"
    out.mkdir()
    (out / "a.b1d").write_bytes(b"mine")
    report = encode_files(tokenizer, [tmp_path / "a.png"], out, Encoding())
    assert not report.files and "is there already" in report.refused[0]["reason"]
    assert (out / "a.b1d").read_bytes() == b"mine"
    report = encode_files(tokenizer, [tmp_path / "a.png"], out, Encoding(), force=True)
    assert len(report.files) == 1
    CodeFile.from_bytes((out / "a.b1d").read_bytes())
    assert [path.name for path in out.iterdir()] == ["a.b1d"]


def test_files_of_one_name_keep_their_suffixes(tokenizer, tmp_path):
    for name in ("a.png", "a.jpg", "b.png", "other/b.png"):
        save(tmp_path / name)
    inputs = [tmp_path / name for name in ("a.png", "a.jpg", "b.png", "other")]
    inputs.append(tmp_path / "a.png")
    report = encode_files(tokenizer, inputs, tmp_path / "out", Encoding())
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["a.jpg.b1d", "a.png.b1d", "b.png.b1d"]
    # Two of them would have been written over another one.
    assert len(report.files) == 3 and len(report.refused) == 2


def test_orientation_is_applied_and_metadata_come_back(tokenizer, tmp_path):
    exif = Image.Exif()
    exif[0x0112], exif[0x010E], exif[0x8298] = 6, "A cat", "Ann Other"
    exif[0x010F] = "Maker of cameras"
    exif.get_ifd(0x8769)[0x9003] = "2026:11:28 12:00:00"
    exif.get_ifd(0x8825)[2] = (1.0, 2.0, 3.0)
    save(tmp_path / "a.jpg", 30, 40, exif=exif)
    encode_files(tokenizer, [tmp_path / "a.jpg"], tmp_path / "codes", Encoding())
    decode_files(tokenizer, [tmp_path / "codes"], tmp_path / "back", Decoding())
    with Image.open(tmp_path / "back/a.png") as image:
        assert image.size == (30, 40)
        found = dict(image.getexif())
    assert found == {0x010E: "A cat", 0x8298: "Ann Other", 0x0132: "2026:11:28 12:00:00"}
    encode_files(tokenizer, [tmp_path / "a.jpg"], tmp_path / "bare", Encoding(), metadata=False)
    assert CodeFile.from_bytes((tmp_path / "bare/a.b1d").read_bytes()).metadata == b""


def test_fewer_tokens_need_a_tokenizer_that_was_trained_for_it(tokenizer, tmp_path):
    save(tmp_path / "a.png")
    with pytest.raises(UserError, match="train one with loss.tail_drop"):
        encode_files(tokenizer, [tmp_path / "a.png"], tmp_path / "out", Encoding(tokens=1))
    with pytest.raises(UserError, match="tokens must be in 1 to"):
        decode_files(tokenizer, [tmp_path / "a.png"], tmp_path / "out", Decoding(tokens=99))
    nested = BinaryTokenizer(
        tokenizer.network, tokenizer.params, shapes=tokenizer.shapes, nested=True,
        fingerprint=tokenizer.fingerprint,
    )  # fmt: skip
    with Image.open(tmp_path / "a.png") as image:
        whole, first = nested.to_bytes(image), nested.to_bytes(image, Encoding(tokens=2))
        code = nested.encode(nested.fit(image))
    assert len(first) == len(whole) - (nested.num_tokens - 2) * nested.bits // 8
    np.testing.assert_array_equal(CodeFile.from_bytes(first).codes[0], code[:2])
    cut = code.copy()
    cut[2:] = 0
    np.testing.assert_array_equal(nested.decode(code[:2]), nested.decode(cut))
    np.testing.assert_array_equal(
        nested.from_bytes(first), nested.from_bytes(whole, Decoding(tokens=2))
    )
    with pytest.raises(UserError, match="loss.tail_drop"):
        tokenizer.from_bytes(first)


@pytest.mark.parametrize("true_checksum", [False, True])
def test_altered_files_are_refused_or_decoded_at_the_size_that_they_say(
    tokenizer, tmp_path, true_checksum
):
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 256, (37, 53, 3), np.uint8)
    originals = [
        tokenizer.to_bytes(picture, Encoding(metadata=b"II*\0")),
        tokenizer.to_bytes(picture, Encoding(tile=20, overlap=4)),
    ]
    altered = [alter(originals[number % 2], rng) for number in range(300)]
    if true_checksum:
        altered = [sealed(data) for data in altered]
    (tmp_path / "codes").mkdir()
    for number, data in enumerate(altered):
        (tmp_path / f"codes/{number:03}.b1d").write_bytes(data)
    report = decode_files(tokenizer, [tmp_path / "codes"], tmp_path / "out", Decoding(size=64))
    assert len(report.files) + len(report.refused) == 300
    same = sum(data in originals for data in altered)
    if not true_checksum:
        assert len(report.files) == same
    for record in report.files:
        said = size_of(record["out"])
        assert said == (record["width"], record["height"]) and max(said) == 64
    assert len(list((tmp_path / "out").glob("*"))) == len(report.files)
