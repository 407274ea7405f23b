"""Folders of pictures as people and libraries write them, read by training and by the import."""

import csv
import io
import json
import logging
import os

import numpy as np
import pytest
from PIL import Image

from instella_jax.cli import run
from instella_jax.data.folder import FolderSource
from instella_jax.data.loader import make_loader
from instella_jax.data.shards import ImageShards
from instella_jax.data.transforms import EvalTransform
from instella_jax.errors import UserError
from instella_jax.preparing.import_report import report_lines
from instella_jax.preparing.importing import import_dataset
from tests.small_data_sets import write_tar


def put(root, *names):
    """Write a picture under each name; its grey is its number."""
    for number, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (24, 24), (10 * number,) * 3).save(path, "png")


def write(root, files):
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def trained(root, **options):
    """{name: captions} that training reads."""
    source = FolderSource(root, **options)
    return {source.entries[i].name: source[i]["texts"] for i in range(len(source))}


def imported(root, out):
    """The report of an import and {name: captions}, what is read being kept or left out."""
    report = import_dataset(root, out, kind="folder")
    source = ImageShards(out, captions=False)
    headers = [source.read(i)[0] for i in range(len(source))]
    assert report["read"] == report["kept"] + sum(report["dropped"].values())
    assert report["kept"] == len(headers)
    return report, {header["key"]: tuple(header["texts"]) for header in headers}


def metadata_file(path, rows):
    """Write rows as the `datasets` library and spreadsheets do."""
    path.parent.mkdir(exist_ok=True)
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8-sig")
    elif path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8-sig") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        pa = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(pa.Table.from_pylist(rows), path)


@pytest.mark.parametrize("where", ["", "train/"])
@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
@pytest.mark.parametrize("key", ["text", "caption", "Prompt"])
def test_metadata_files(tmp_path, caplog, where, kind, key):
    root = tmp_path / "in"
    put(root, f"{where}a.png", f"{where}deep/b.png", f"{where}extra.png", f"{where}deep/more.png")
    rows = [
        {"file_name": "deep/b.png", key: 'ein "Käfer",\n rot', "license": "CC0"},
        {"file_name": "./a.png", key: "a cat", "license": "CC0"},
    ]
    metadata_file(root / where / f"metadata.{kind}", rows)
    write(root, {f"{where}extra.txt": "not read where there is metadata"})
    expected = {f"{where}deep/b.png": ('ein "Käfer", rot',), f"{where}a.png": ("a cat",)}
    assert trained(root) == expected and list(trained(root)) == list(expected)
    told = [r.getMessage() for r in caplog.records]
    assert len(told) == 1 and "2 pictures of" in told[0] and f"{where}extra.png" in told[0]
    report, found = imported(root, tmp_path / "out")
    assert found == expected and report["dropped"] == {"not in the metadata file": 2}
    assert sorted(report["examples"]["not in the metadata file"]) == [
        f"{where}deep/more.png", f"{where}extra.png",
    ]  # fmt: skip


def test_splits_with_metadata_of_their_own_and_pictures_beside_them(tmp_path):
    root = tmp_path / "in"
    put(root, "train/0.png", "test/0.png", "loose/0.png")
    metadata_file(root / "train/metadata.csv", [{"file_name": "0.png", "text": "train"}])
    metadata_file(root / "test/metadata.jsonl", [{"file_name": "0.png", "text": ["te", "st"]}])
    write(root, {"loose/0.caption": "loose"})
    expected = {"train/0.png": ("train",), "test/0.png": ("te", "st"), "loose/0.png": ("loose",)}
    assert trained(root) == expected == imported(root, tmp_path / "out")[1]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("metadata.csv", b"name,text\na.png,x\n", 'line 2: expected .*"file_name".*name, text'),
        ("metadata.csv", b"file_name,text\n../a.png,x\n", "leads out of the folder"),
        ("metadata.csv", b"file_name,text\na.png,K\xe4fer\n", "not UTF-8"),
        ("metadata.csv", b'file_name,text\na.png,"' + b"x" * 200_000, "not CSV"),
        ("metadata.parquet", b"PAR1 but not whole", "not a whole Parquet file"),
        ("metadata.jsonl", b"[" * 100_000, "not JSON"),
    ],
)
def test_broken_metadata_is_one_sentence(tmp_path, name, content, message):
    put(tmp_path, "a.png")
    write(tmp_path, {name: content})
    for read in (FolderSource, lambda root: import_dataset(root, tmp_path / "out", kind="folder")):
        with pytest.raises(UserError, match=message) as error:
            read(tmp_path)
        assert "\n" not in str(error.value)


def test_files_beside_pictures(tmp_path):
    root = tmp_path / "in"
    put(root, *(f"{name}.png" for name in "abcdefg"))
    files = {
        "g.png.json": json.dumps({"caption": "of the file"}), "g.png.txt": "so", "g.txt": "too",
        "a.txt": "one\n\n two  words\r\none\n",
        "b.caption": "of kohya", "c.caption": "first\nsecond",
        "c.txt": "third", "d.json": json.dumps({"caption": "of JSON", "pwatermark": 0.1}),
        "e.json": json.dumps({"caption": ["x", "y"], "width": 3}), "e.txt": "x",
    }  # fmt: skip
    write(root, files)
    expected = {
        "a.png": ("one", "two words"), "b.png": ("of kohya",),
        "c.png": ("third", "first", "second"), "d.png": ("of JSON",), "e.png": ("x", "y"),
        "g.png": ("too", "so", "of the file"),
    }  # fmt: skip
    assert trained(root) == expected
    report, found = imported(root, tmp_path / "out")
    assert found == expected and report["dropped"] == {"no caption": 1}
    write(root, {"f.txt": b"K\xe4fer", "a.json": "{", "b.json": json.dumps({"pwatermark": 0.9})})
    report, found = imported(root, tmp_path / "again")
    assert report["dropped"] == {"broken caption": 1, "broken JSON": 1, "watermark": 1}
    assert len(found) == 4


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_columns_that_filters_ask_for_and_json_files_beside_listed_pictures(tmp_path, kind):
    root = tmp_path / "in"
    put(root, "clean.png", "marked.png", "told.png", "listed.png")
    names = ["clean.png", "marked.png", "told.png", "listed.png"]
    scores = ["0.1", "0.9", "", ""]
    rows = [
        {"file_name": name, "text": name[:-4], "PWatermark": score}
        for name, score in zip(names, scores, strict=True)
    ]
    metadata_file(root / f"metadata.{kind}", rows)
    write(root, {"told.json": '{"pwatermark": 0.8}', "listed.json": '{"caption": "once more"}'})
    write(root, {"clean.png.json": '{"caption": "spotless"}'})
    report, found = imported(root, tmp_path / "out")
    assert report["dropped"] == {"watermark": 2}
    assert found == {"clean.png": ("clean", "spotless"), "listed.png": ("listed", "once more")}
    assert trained(root, split="all")["listed.png"] == ("listed", "once more")


def test_the_captions_of_a_file_are_those_of_its_lines_in_a_folder_and_in_a_tar(tmp_path):
    root = tmp_path / "in"
    put(root, "a.png")
    write(root, {"a.txt": "one\ntwo  words\n\n", "a.caption": "three"})
    paths = sorted(root.iterdir())
    write_tar(tmp_path / "a.tar", [(path.name, path.read_bytes()) for path in paths])
    _, of_folder = imported(root, tmp_path / "folder")
    import_dataset(tmp_path / "a.tar", tmp_path / "tar")
    of_tar = ImageShards(tmp_path / "tar", captions=False).read(0)[0]["texts"]
    assert of_folder == {"a.png": ("one", "two words", "three")}
    assert tuple(of_tar) == of_folder["a.png"]


def test_folders_of_classes(tmp_path, caplog):
    root = tmp_path / "in"
    put(root, "train/red_fox/1.png", "train/cat/2.png", "train/3.png", "val/cat/4.png")
    expected = {
        "train/cat/2.png": ("A photo of cat",), "train/red_fox/1.png": ("A photo of red fox",),
        "val/cat/4.png": ("A photo of cat",),
    }  # fmt: skip
    assert trained(root) == expected
    told = caplog.text
    assert "names of 2 folders" in told and '"A photo of cat"' in told
    assert "1 of 4 pictures have no caption" in told and "train/3.png" in told
    report, found = imported(root, tmp_path / "out")
    assert found == expected and report["dropped"] == {"no caption": 1}
    # With captions anywhere, folders are folders.
    write(root, {"train/3.txt": "said"})
    assert trained(root) == {"train/3.png": ("said",)}


@pytest.mark.parametrize(
    "names",
    [("a.png",), ("images/a.png", "train/b.png"), ("0001/a.png", "0002/b.png"), ("cat/a.png",)],
)
def test_folders_that_are_no_classes(tmp_path, names):
    put(tmp_path, *names)
    write(tmp_path, {"captions.xml": "<x/>", "notes.md": ""})
    for read in (FolderSource, lambda root: import_dataset(root, root / "out")):
        with pytest.raises(UserError) as error:
            read(tmp_path)
        said = str(error.value)
        for part in ("1 .xml", "1 .md", "metadata.csv", ".caption", "each class"):
            assert part in said
    assert len(FolderSource(tmp_path, captions=False)) == len(names)


def test_pictures_that_are_not_read_are_told(tmp_path, caplog):
    put(tmp_path, "a.png")
    write(tmp_path, {"a.txt": "x", "b.svg": "", "c.SVG": "", "d.psd": "", "e.eps": "", "f.xml": ""})
    trained(tmp_path)
    trained(tmp_path)
    assert [record.getMessage() for record in caplog.records] == [
        f"pictures of {tmp_path} in formats that are not read are left out: 2 .svg, 1 .psd, 1 .eps"
    ]


def test_names_that_are_not_utf8(tmp_path, caplog, capsys):
    root = tmp_path / "in"
    put(root, "a.png")
    good, bad = os.fsencode(root) + b"/caf\xe9.jpg", os.fsencode(root) + b"/sub\xff/b\xe9.png"
    os.mkdir(os.path.dirname(bad))
    with open(good, "wb") as file:
        Image.new("RGB", (24, 24), "white").save(file, "jpeg")
    with open(bad, "wb") as file:
        file.write(b"no picture")
    for path in (good, bad, os.fsencode(root) + b"/a.png"):
        with open(path[:-4] + b".txt", "w") as file:
            file.write("x")
    for split in ("train", "heldout"):
        assert len(FolderSource(root, split=split, heldout=0.4)) in (1, 2)
    loader = make_loader(
        FolderSource(root), batch_size=2, seed=0, repeat=False, transform=EvalTransform(8, 8)
    )
    assert sorted(b["image"].mean() for b in loader) == [127.5]
    told = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert len(told) == 1 and r"sub\xff/b\xe9.png cannot be read" in told[0]
    told[0].encode()
    assert FolderSource(root).sizes().tolist() == [[24, 24], [24, 24], [0, 0]]
    run(["data", "import", str(root), str(tmp_path / "out")])
    said = capsys.readouterr().out
    said.encode()
    assert "kept 2 of 3" in said and r"broken picture: 1 (sub\xff/b\xe9.png)" in said
    report = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    assert report["examples"]["broken picture"] == [r"sub\xff/b\xe9.png"]
    source = ImageShards(tmp_path / "out")
    keys = {source.read(i)[0]["key"]: source[i]["image"].mean() for i in range(2)}
    assert keys == {"a.png": 0, r"caf\xe9.jpg": 255}


def test_links_are_followed_once_and_not_in_circles(tmp_path):
    root, outside = tmp_path / "in", tmp_path / "outside"
    put(root, "a/1.png")
    put(outside, "2.png", "deep/3.png")
    for path in (root / "a/1.png", outside / "2.png", outside / "deep/3.png"):
        path.with_suffix(".txt").write_text(path.stem)
    (root / "link").symlink_to(outside)
    (root / "z").symlink_to(outside / "deep")  # what is in two of them is read in one
    (root / "again").symlink_to(root / "a")  # read where it is
    (root / "a" / "loop").symlink_to(root)
    (outside / "loop").symlink_to(root)
    (outside / "up").symlink_to(tmp_path)
    (root / "gone").symlink_to(tmp_path / "missing")
    (root / "4.png").symlink_to(outside / "2.png")
    (root / "4.txt").write_text("4")
    expected = {"4.png": ("4",), "a/1.png": ("1",), "link/2.png": ("2",), "z/3.png": ("3",)}
    assert trained(root) == expected == imported(root, tmp_path / "out")[1]
    (tmp_path / "linked").symlink_to(root)
    assert trained(tmp_path / "linked") == expected


def test_pictures_beside_tars_are_counted_with_what_to_do(tmp_path):
    root = tmp_path / "in"
    put(root, "a.png", "deep/b.png")
    file = io.BytesIO()
    Image.new("RGB", (24, 24)).save(file, "png")
    write_tar(root / "0.tar", [("1.png", file.getvalue()), ("1.txt", b"in the tar")])
    report = import_dataset(root, tmp_path / "out")
    assert report["kept"] == 1 and report["not_read"] == {".png": 2}
    lines = list(report_lines(report))
    assert "  not read, .png: 2 (a.png, deep/b.png)" in lines
    assert any("--kind=folder" in line for line in lines)
    write(root, {"a.txt": "loose"})
    report, found = imported(root, tmp_path / "loose")
    assert found == {"a.png": ("loose",)} and report["not_read"] == {".tar": 1}


def test_both_readers_take_all_kinds_of_pictures(tmp_path):
    root = tmp_path / "in"
    root.mkdir()
    grey = np.full((16, 16, 3), 90, np.uint8)
    kinds = {
        "jpg": "jpeg", "JPEG": "jpeg", "jpe": "jpeg", "jfif": "jpeg", "png": "png", "webp": "webp",
        "avif": "avif", "gif": "gif", "bmp": "bmp", "tif": "tiff", "tiff": "tiff", "ppm": "ppm",
        "jp2": "jpeg2000", "j2k": "jpeg2000", "jpx": "jpeg2000",
    }  # fmt: skip
    for suffix, kind in kinds.items():
        Image.fromarray(grey).save(root / f"{suffix}.{suffix}", kind)
        (root / f"{suffix}.txt").write_text(suffix)
    assert {texts[0] for texts in trained(root).values()} == set(kinds)
    assert imported(root, tmp_path / "out")[0]["kept"] == len(kinds)
