"""Parquet files of many shapes, written by pyarrow: every row is kept or left out for a reason."""

import io
import json
import os
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from instella_jax.data.shards import ImageShards
from instella_jax.errors import UserError
from instella_jax.preparing.filters import Filters
from instella_jax.preparing.import_report import report_lines
from instella_jax.preparing.importing import Reading, import_dataset
from instella_jax.preparing.parquet_reader import read_parquet
from tests.paths import ROOT

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def picture(value, side=16):
    file = io.BytesIO()
    Image.new("RGB", (side, side), (value, value, value)).save(file, "png")
    return file.getvalue()


def noise(number, side=64):
    """A picture that does not compress: 12 KB at 64 pixels."""
    file = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (side, side, 3), np.uint8)
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


def write(path, columns, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.table(columns), path, **options)
    return path


def rows_of(*paths):
    """How many rows there are, by pyarrow."""
    return sum(parquet.read_metadata(path).num_rows for path in paths)


def contents(folder):
    """(captions, mean colour) of everything in a data set, in its order."""
    source = ImageShards(folder, captions=False)
    return [
        (source.read(i)[0]["texts"], float(source[i]["image"].mean())) for i in range(len(source))
    ]


def assert_sum(report, *paths):
    assert report["read"] == report["kept"] + sum(report["dropped"].values()) == rows_of(*paths)


@pytest.mark.parametrize("image", ["image", "jpg", "png", "webp", "IMG", "image_bytes", "Image"])
@pytest.mark.parametrize("caption", ["text", "TEXT", "txt", "Caption", "re_caption", "prompt"])
def test_the_usual_names_of_columns(tmp_path, image, caption):
    path = write(tmp_path / "a.parquet", {image: [picture(9)], caption: ["nine"], "url": ["x"]})
    (item,) = read_parquet(str(path), Reading().caption_keys)
    assert (item.image, item.texts, item.seen) == (picture(9), ("nine",), (image, caption, "url"))


def test_case_matters_where_names_differ_in_nothing_else(tmp_path):
    columns = {"image": [picture(9)], "text": ["low"], "TEXT": ["high"], "A": ["x"], "a": ["y"]}
    path = str(write(tmp_path / "a.parquet", columns))
    assert [item.texts for item in read_parquet(path, ["text"])] == [("low",)]
    assert [item.texts for item in read_parquet(path, ["Text"])] == [()]
    assert [item.texts for item in read_parquet(path, ["A"])] == [("x",)]


def test_of_several_columns_of_pictures_the_filled_one_counts(tmp_path):
    columns = {
        "png": [None, picture(20), None, b""],
        "image": pa.array([None, None, {"bytes": picture(30), "path": "x"}, None], IMAGE),
        "jpg": [picture(10), None, None, None],
        "text": ["ten", "twenty", "thirty", "none"],
        "webp": [1, 2, 3, 4],
    }
    path = write(tmp_path / "a.parquet", columns)
    report = import_dataset(path, tmp_path / "out")
    assert contents(tmp_path / "out") == [(["ten"], 10), (["twenty"], 20), (["thirty"], 30)]
    assert report["dropped"] == {"no picture": 1}
    assert_sum(report, path)
    with pytest.raises(UserError, match="column webp of .* is of type int64, expected bytes or"):
        import_dataset(path, tmp_path / "none", reading=Reading(image_key="webp"))
    with pytest.raises(UserError, match="has no column depth, only png, image, jpg, text, webp;"):
        import_dataset(path, tmp_path / "none2", reading=Reading(image_key="depth"))


def test_paths_are_read_inside_the_data_set_and_nowhere_else(tmp_path):
    root = tmp_path / "set"
    (root / "data").mkdir(parents=True)
    (root / "data" / "beside.png").write_bytes(picture(10))
    (root / "above.png").write_bytes(picture(20))
    (tmp_path / "outside.png").write_bytes(picture(66))
    (root / "link.png").symlink_to(tmp_path / "outside.png")
    (root / "set-of-another-name").mkdir()
    paths = [
        "beside.png", "above.png", str(root / "above.png"), "../above.png", "missing.png",
        "../../outside.png", str(tmp_path / "outside.png"), "../link.png", "link.png", "", None,
        "data", "x\0y",
    ]  # fmt: skip
    images = [{"bytes": None, "path": path} for path in paths]
    texts = [f"row {number}" for number in range(len(paths))]
    path = write(root / "data" / "a.parquet", {"image": pa.array(images, IMAGE), "text": texts})
    report = import_dataset(root, tmp_path / "out")
    assert [mean for _, mean in contents(tmp_path / "out")] == [10, 20, 20, 20]
    assert report["dropped"] == {"no picture": 9}
    assert_sum(report, path)
    # Of a file alone, the data set is the folder that it is in.
    report = import_dataset(path, tmp_path / "alone")
    assert [mean for _, mean in contents(tmp_path / "alone")] == [10]
    assert_sum(report, path)


def test_one_caption_that_is_not_utf8_costs_one_row(tmp_path):
    raw = [b"caf\xe9", "café".encode(), b"\xef\xbb\xbfmark", "täg".encode("utf-16"), b"a\0b"]
    offsets = pa.array(np.cumsum([0, *map(len, raw)]), pa.int32()).buffers()[1]
    texts = pa.StringArray.from_buffers(len(raw), offsets, pa.py_buffer(b"".join(raw)))
    lists = pa.ListArray.from_arrays(pa.array(range(6), pa.int32()), texts)
    for number, column in enumerate((texts, lists, texts.dictionary_encode())):
        columns = {"image": [picture(9)] * 5, "text": column}
        path = write(tmp_path / f"{number}.parquet", columns)
        report = import_dataset(path, tmp_path / f"out{number}")
        assert [texts for texts, _ in contents(tmp_path / f"out{number}")] == [["café"], ["mark"]]
        assert report["dropped"] == {"broken caption": 3}
        assert_sum(report, path)


def test_filters_read_plain_columns_of_any_type(tmp_path):
    scores = pa.array(["0.9", "0.1", None]).dictionary_encode()
    columns = {"image": [picture(9)] * 3, "text": ["a", "b", "c"], "pwatermark": scores}
    report = import_dataset(write(tmp_path / "a.parquet", columns), tmp_path / "out")
    assert report["dropped"] == {"watermark": 1} and report["kept"] == 2


def damage(path, needle):
    """Flip bits where some bytes are in a file."""
    data = bytearray(path.read_bytes())
    place = data.index(needle)
    data[place] ^= 0xFF
    path.write_bytes(data)


def test_a_damaged_page_costs_its_row_group_from_there_on(tmp_path):
    pictures = [noise(number) for number in range(100)]
    path = write(
        tmp_path / "a.parquet",
        {"image": pictures, "text": [f"row {number}" for number in range(100)]},
        row_group_size=50,
        compression="none",
        use_dictionary=False,
        data_page_size=2**14,
        write_batch_size=1,
        write_page_checksum=True,
    )
    damage(path, pictures[40][1000:1020])
    report = import_dataset(path, tmp_path / "out")
    kept = [int(texts[0].split()[1]) for texts, _ in contents(tmp_path / "out")]
    # A page holds a few rows. All of the second group is there.
    first = next(number for number in range(100) if number not in kept)
    assert 37 <= first <= 40 and kept == [*range(first), *range(50, 100)]
    lost = 50 - first
    assert report["dropped"] == {"damaged row group": lost} and report["damaged_files"] == 0
    assert report["examples"] == {"damaged row group": [f"{path} rows {first} to 49"]}
    assert_sum(report, path)
    line = f"  left out, damaged row group: {lost} ({path} rows {first} to 49, ...)"
    assert line in report_lines(report)


def test_a_file_that_is_cut_off_is_told(tmp_path):
    path = write(tmp_path / "a.parquet", {"image": [picture(9)], "text": ["x"]})
    (tmp_path / "b.parquet").write_bytes(path.read_bytes()[:-9])
    report = import_dataset(tmp_path, tmp_path / "out")
    assert report["kept"] == 1 and report["damage"] == [str(tmp_path / "b.parquet")]


MEMORY = """
import sys
import pyarrow as pa
from instella_jax.preparing.parquet_reader import read_parquet
items = list(len(item.image) for item in read_parquet(sys.argv[1], ["text"]))
print(len(items), pa.default_memory_pool().max_memory())
"""


def test_memory_does_not_grow_with_a_row_group(tmp_path):
    rows, size = 400, 2**18
    path = write(
        tmp_path / "a.parquet",
        {"image": [os.urandom(size) for _ in range(rows)], "text": ["x"] * rows},
        write_batch_size=1,
        use_dictionary=False,
    )
    assert parquet.read_metadata(path).num_row_groups == 1
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", MEMORY, path]
    result = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE)
    read, most = map(int, result.stdout.split())
    # All of it is 100 MiB.
    assert read == rows and most < 50 * 2**20


def test_splits_are_not_mixed(tmp_path, caplog):
    folder = tmp_path / "in"
    files = {
        name: write(folder / name, {"image": [picture(v)] * n, "text": [str(v)] * n})
        for name, v, n in (
            ("data/train-00000-of-00002.parquet", 10, 2),
            ("data/train-00001-of-00002.parquet", 20, 1),
            ("data/test-00000-of-00001.parquet", 30, 3),
            ("validation/0000.parquet", 40, 4),
            ("trainer.parquet", 50, 5),
        )
    }
    report = import_dataset(folder, tmp_path / "train")
    assert [texts for texts, _ in contents(tmp_path / "train")] == [["10"], ["10"], ["20"]]
    dropped = {"of split none": 5, "of split validation": 4, "of split test": 3}
    assert report["dropped"] == dropped and list(report["dropped"]) == list(dropped)
    assert_sum(report, *files.values())
    assert caplog.messages == [
        f"of {folder} only the split train is read (2 of 5 files); --split chooses another, or all"
    ]
    report = import_dataset(folder, tmp_path / "val", split="val")
    assert report["kept"] == 4 and report["read"] == 15
    report = import_dataset(folder, tmp_path / "all", split="all")
    assert (report["kept"], report["dropped"]) == (15, {})
    with pytest.raises(UserError, match="no split 'extra', only test, train, validation; choose"):
        import_dataset(folder, tmp_path / "none", split="extra")
    (folder / "data" / "test-00000-of-00001.parquet").write_bytes(b"no parquet")
    report = import_dataset(folder, tmp_path / "damaged")
    assert report["kept"] == 3 and report["damaged_files"] == 1
    # Files that are not named by splits are all read.
    report = import_dataset(files["trainer.parquet"], tmp_path / "one")
    assert report["kept"] == 5 and report["dropped"] == {}


def test_without_captions_the_columns_and_the_option_are_named(tmp_path):
    columns = {"image": [picture(9)] * 2, "title": ["a", "b"], "width": [16, 16]}
    path = write(tmp_path / "a.parquet", columns)
    with pytest.raises(UserError) as raised:
        import_dataset(path, tmp_path / "out")
    assert str(raised.value).startswith(
        f"nothing of {path} was kept (no caption 2); pictures without a caption have image, title, "
        "width: name what their captions are in by --caption-keys, or keep them by --no-captions; "
    )
    report = import_dataset(path, tmp_path / "out", reading=Reading(caption_keys=("title",)))
    assert [texts for texts, _ in contents(tmp_path / "out")] == [["a"], ["b"]]
    assert report["seen"] == []
    report = import_dataset(path, tmp_path / "all", filters=Filters(captions=False))
    assert report["kept"] == 2


def test_classes_make_captions(tmp_path):
    features = {"info": {"features": {"label": {"_type": "ClassLabel", "names": ["red_fox"]}}}}
    table = pa.table({"img": [picture(9)] * 2, "label": [0, -1]})
    table = table.replace_schema_metadata({"huggingface": json.dumps(features)})
    parquet.write_table(table, tmp_path / "a.parquet")
    items = list(read_parquet(str(tmp_path / "a.parquet"), ["text"]))
    assert [item.texts for item in items] == [("A photo of red fox",), ()]
