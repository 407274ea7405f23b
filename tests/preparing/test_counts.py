"""What an import has seen is kept or counted, against counts of the files' own libraries."""

import io
import json
import os
from collections import Counter

import pytest

from instella_jax.preparing.import_report import report_lines
from instella_jax.preparing.importing import import_dataset
from tests.small_data_sets import contents, make_tfds, picture, samples, write_tar


def test_folder(tmp_path):
    folder = tmp_path / "in"
    for name, content in {
        "a.png": picture(10), "a.txt": b"a", "a.json": b"{}", "b.gif": picture(20, kind="gif"),
        "b.txt": b"\xff", "sub/c.jpg": b"x", "sub/c.txt": b"c",
        "sub/d.tiff": picture(30, kind="tiff"),
        "e.npy": b"x", "sub/f.mp4": b"x", "lost.txt": b"no picture", ".hidden.png": b"x",
        "README": b"x", "_.png": picture(40), "._a.png": b"x", ".git/HEAD": b"x",
        ".git/x.png": b"x",
        "empty.png": picture(50), "empty.txt": b" ",
    }.items():  # fmt: skip
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    report = import_dataset(folder, tmp_path / "out")
    assert report["kept"] == 1 and list(contents(tmp_path / "out")) == ["a.png"]
    assert report["dropped"] == {"no caption": 3, "broken caption": 1, "broken picture": 1}
    files = [os.path.join(where, n) for where, _, names in os.walk(folder) for n in names]
    seen = [path for path in files if "/." not in path]
    used = {"a.txt", "a.json", "b.txt", "c.txt", "empty.txt"}
    rest = [path for path in seen if os.path.basename(path) not in used]
    kinds = Counter(os.path.splitext(path)[1] for path in rest)
    pictures = sum(kinds.pop(kind) for kind in (".png", ".gif", ".jpg", ".tiff"))
    assert report["kept"] + sum(report["dropped"].values()) == report["read"] == pictures
    # One for `.git`, which is not opened.
    assert report["not_read"] == {
        "hidden": 3, "no suffix": kinds.pop(""), **kinds,
    }  # fmt: skip
    assert "  not read, .txt: 1 (lost.txt)" in report_lines(report)


def test_folder_with_metadata(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    rows = [{"file_name": f"{name}.png", "text": name} for name in "abz"]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in "abc":
        (folder / f"{name}.png").write_bytes(picture(10))
    report = import_dataset(folder, tmp_path / "out")
    assert list(contents(tmp_path / "out")) == ["a.png", "b.png"]
    # z is listed and not there, c is there and not listed.
    assert report["dropped"] == {"file cannot be read": 1, "not in the metadata file": 1}
    assert report["read"] == 4 and report["not_read"] == {}


def test_parquet(tmp_path):
    import pyarrow as pa
    from pyarrow import parquet

    images = [picture(10), None, b"x", picture(20), picture(30), picture(40)]
    texts = ["a", "b", "c", None, b"\xff".decode("latin-1"), "\0"]
    parquet.write_table(
        pa.table({"image": images, "caption": texts}), tmp_path / "a.parquet", row_group_size=2
    )
    (tmp_path / "b.csv").write_text("x")
    (tmp_path / "loose.png").write_bytes(picture(10))
    report = import_dataset(tmp_path, tmp_path / "out")
    rows = parquet.ParquetFile(tmp_path / "a.parquet").metadata.num_rows
    assert report["kept"] + sum(report["dropped"].values()) == report["read"] == rows == 6
    assert report["dropped"] == {
        "no picture": 1, "broken picture": 1, "no caption": 1, "broken caption": 1,
    }  # fmt: skip
    assert report["not_read"] == {".csv": 1, ".png": 1}


@pytest.mark.filterwarnings("ignore")
def test_tfds(tmp_path):
    import tensorflow_datasets as tfds

    images = [picture(10), picture(20), b"x", picture(30), picture(40)]
    texts = ["a", "", "c", b"\xff", "e"]
    features = {"image": tfds.features.Image(), "text": tfds.features.Text()}
    examples = [
        {"image": io.BytesIO(image), "text": text}
        for image, text in zip(images, texts, strict=True)
    ]
    folder = make_tfds(tmp_path / "in", features, examples)
    report = import_dataset(folder, tmp_path / "out", unit_size=2)
    total = tfds.builder_from_directory(str(folder)).info.splits["train"].num_examples
    assert report["kept"] + sum(report["dropped"].values()) == report["read"] == total == 5
    assert report["dropped"] == {"no caption": 1, "broken picture": 1, "broken caption": 1}


def test_folder_of_tars_and_other_files(tmp_path):
    """Every format is accepted in a tar as it is in a folder."""
    folder, tars = tmp_path / "pictures", tmp_path / "tars"
    folder.mkdir()
    (tars / "deep").mkdir(parents=True)
    kinds = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tiff", "tif", "avif", "ppm", "jp2")
    names = {"jpg": "jpeg", "tif": "tiff", "jp2": "jpeg2000"}
    members = []
    for kind in kinds:
        content = picture(100, kind=names.get(kind, kind))
        members += [(f"{kind}.{kind}", content), (f"{kind}.txt", kind.encode())]
    for name, content in members:
        (folder / name).write_bytes(content)
    write_tar(tars / "deep" / "a.tar", members)
    (tars / "loose.jpg").write_bytes(picture(10))
    (tars / "stats.json").write_text("{}")
    here = import_dataset(folder, tmp_path / "one")
    there = import_dataset(tars, tmp_path / "two")
    assert here["kept"] == there["kept"] == len(kinds) and here["dropped"] == there["dropped"] == {}
    assert there["not_read"] == {".jpg": 1, ".json": 1}
    captions = {texts[0] for texts, _ in contents(tmp_path / "two").values()}
    assert captions == {texts[0] for texts, _ in contents(tmp_path / "one").values()} == set(kinds)


def test_an_output_inside_of_the_input_is_no_input(tmp_path):
    write_tar(tmp_path / "a.tar", samples([10]))
    report = import_dataset(tmp_path, tmp_path / "out")
    assert report["not_read"] == {}
    assert import_dataset(tmp_path, tmp_path / "out") == report
