"""Import of real small files of each form, damaged ones among them, and of killed imports."""

import fcntl
import io
import itertools
import json
import os
import signal
import subprocess
import sys
import tarfile
import time

import numpy as np
import pytest
from PIL import Image

from instella_jax.data.captions import captions, label_caption
from instella_jax.data.shards import ImageShards, Records
from instella_jax.errors import UserError
from instella_jax.preparing import importing
from instella_jax.preparing.filters import Filters
from instella_jax.preparing.import_report import report_lines
from instella_jax.preparing.importing import Reading, import_dataset
from instella_jax.preparing.readers import find_units, read_unit
from tests.paths import ROOT
from tests.small_data_sets import contents, make_tfds, picture, samples, write_tar


def test_webdataset(tmp_path):
    members = [
        ("a/1.jpg", picture(10, kind="jpeg")),
        ("a/1.txt", b" one  line \n"),
        ("a/1.json", json.dumps({"caption": "one line", "captions": ["eins", "un"]}).encode()),
        ("a/2.json", json.dumps({"text": "two \ud800", "pwatermark": 0.2}).encode()),
        ("a/2.webp", picture(20, kind="webp")),
        ("a/2.npy", b"not read"),
        ("b/2.png", picture(30)),
        ("b/2.txt", "drei ü".encode()),
    ]
    write_tar(tmp_path / "00.tar", members)
    write_tar(tmp_path / "01.tar.gz", samples([40, 50]), "w:gz")
    report = import_dataset(tmp_path, tmp_path / "out")
    assert (report["read"], report["kept"], report["captions"]) == (5, 5, 7)
    assert report["dropped"] == {} and report["shards"] == 2
    found = contents(tmp_path / "out")
    assert found["a/1"][0] == ["one line", "eins", "un"]
    assert found["a/2"][0] == ["two ?"]
    assert found["b/2"][0] == ["drei ü"]
    assert [round(mean, -1) for _, mean in found.values()] == [10, 20, 30, 40, 50]


def test_filters_and_everything_that_can_be_wrong(tmp_path):
    good = picture(100, 64, 64)
    bomb = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(bomb, "png")
    turned = Image.Exif()
    turned[0x0112] = 6
    cases = {
        "good": (good, {"pwatermark": 0.5, "text": "x"}, None),
        "upright": (picture(7, 60, 90, "jpeg", exif=turned), {"text": "x"}, None),
        "watermark": (good, {"pwatermark": 0.51, "text": "x"}, "watermark"),
        "spelled": (good, {"PWATERMARK": " 0.9", "text": "x"}, "watermark"),
        "unmarked": (good, {"pwatermark": "0.5", "text": "x"}, None),
        "nan": (good, {"pwatermark": float("nan"), "text": "x"}, None),
        "spelled nan": (good, {"pwatermark": "NaN", "text": "x"}, None),
        "null": (good, {"pwatermark": None, "text": "x"}, None),
        "blank": (good, {"pwatermark": "", "text": "x"}, None),
        "words": (good, {"pwatermark": "unknown", "text": "x"}, None),
        "small": (picture(1, 49, 80), {"text": "x"}, "too small"),
        "long": (picture(1, 50, 101), {"text": "x"}, "aspect ratio"),
        "silent": (good, {"text": " "}, "no caption"),
        "blind": (None, {"text": "x"}, "caption without a picture"),
        "cut": (picture(100, 64, 64, "jpeg")[:-200], {"text": "x"}, "broken picture"),
        "cutpng": (good[:-100], {"text": "x"}, "broken picture"),
        "empty": (b"", {"text": "x"}, "broken picture"),
        "text": (b"<html>", {"text": "x"}, "broken picture"),
        "bomb": (bomb.getvalue(), {"text": "x"}, "too many pixels"),
        "json": (good, None, "broken JSON"),
    }
    members = []
    for name, (image, meta, _) in cases.items():
        if image is not None:
            members.append((f"{name}.jpg", image))
        members.append((f"{name}.json", b"{" if meta is None else json.dumps(meta).encode()))
    write_tar(tmp_path / "a.tar", members)
    filters = Filters(min_side=50, max_aspect=2.0)
    report = import_dataset(tmp_path / "a.tar", tmp_path / "out", filters=filters)
    expected = {}
    for name, (_, _, reason) in cases.items():
        if reason:
            expected.setdefault(reason, []).append(name)
    assert report["examples"] == expected
    assert report["dropped"] == {reason: len(names) for reason, names in expected.items()}
    kept = [name for name, (_, _, reason) in cases.items() if not reason]
    assert list(contents(tmp_path / "out")) == kept
    records = Records(tmp_path / "out", "images")
    assert [records.read(i)[0]["size"] for i in range(2)] == [[64, 64], [60, 90]]
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == report
    lines = list(report_lines(report))
    assert lines[0].startswith("kept 8 of 20 pictures with 8 captions")
    assert "  left out, broken picture: 4 (cut, cutpng, empty, text)" in lines


def test_a_damaged_tar_is_read_past_the_damage(tmp_path):
    path = tmp_path / "a.tar"
    write_tar(path, samples(range(10, 20)))
    with tarfile.open(path) as tar:
        offset = tar.getmember("000013.png").offset
    whole = path.read_bytes()
    path.write_bytes(whole[: offset + 10] + b"damage" + whole[offset + 16 :])
    report = import_dataset(path, tmp_path / "one")
    keys = [f"{n:06d}" for n in range(10, 20)]
    assert list(contents(tmp_path / "one")) == [key for key in keys if key != "000013"]
    assert report["dropped"] == {"caption without a picture": 1} and report["damaged_files"] == 1
    assert (report["read"], report["kept"]) == (10, 9)
    assert f"  damaged files, read in part: 1 ({path} at byte {offset})" in report_lines(report)
    # Cut off within a picture, and between two members.
    for cut in (offset + 600, offset):
        path.write_bytes(whole[:cut])
        out = tmp_path / f"cut{cut}"
        report = import_dataset(path, out)
        assert list(contents(out)) == keys[:3]
        assert report["damaged_files"] == 1 and report["read"] == report["kept"] == 3
    # Two whole tars in one file are no damage.
    path.write_bytes(whole + whole)
    report = import_dataset(path, tmp_path / "two")
    assert report["dropped"] == {} and report["damaged_files"] == 0


def test_a_damaged_compressed_tar(tmp_path):
    path = tmp_path / "a.tgz"
    write_tar(path, samples(range(10, 40), height=64, width=64), "w:gz")
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    (tmp_path / "b.tar").write_bytes(b"no tar at all" * 100)
    report = import_dataset(tmp_path, tmp_path / "out")
    assert report["dropped"] == {} and 5 < report["kept"] < 30
    assert report["damaged_files"] == len(report["damage"]) == 2


def test_parquet(tmp_path):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    rows = pa.table(
        {
            "image": pa.array(
                [{"bytes": picture(i), "path": None} for i in (10, 20, 30)] + [None], image
            ),
            "caption": ["ten", "twenty", None, "four"],
            "all_captions": [["ten", "zehn"], [], None, ["x"]],
            "pwatermark": [0.1, 0.9, None, None],
        }
    )
    parquet.write_table(rows, tmp_path / "a.parquet")
    features = {
        "info": {"features": {"label": {"_type": "ClassLabel", "names": ["red_fox", "cat"]}}}
    }
    labelled = pa.table({"img": [picture(40), picture(50), picture(60)], "label": [0, 1, 5]})
    labelled = labelled.replace_schema_metadata({"huggingface": json.dumps(features)})
    parquet.write_table(labelled, tmp_path / "b.parquet")
    whole = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "c.parquet").write_bytes(whole[:-40])
    report = import_dataset(tmp_path, tmp_path / "out")
    found = contents(tmp_path / "out")
    assert [texts for texts, _ in found.values()] == [
        ["ten", "zehn"], ["A photo of red fox"], ["A photo of cat"],
    ]  # fmt: skip
    assert [round(mean, -1) for _, mean in found.values()] == [10, 40, 50]
    assert report["dropped"] == {
        "no caption": 2, "watermark": 1, "no picture": 1,
    }  # fmt: skip
    assert report["read"] == 7 and report["damage"] == [f"{tmp_path / 'c.parquet'}"]
    parquet.write_table(pa.table({"url": ["http://x"]}), tmp_path / "d.parquet")
    with pytest.raises(UserError, match="has no column image or .*only url.*not fetched"):
        import_dataset(tmp_path / "d.parquet", tmp_path / "none")
    reading = Reading(caption_keys=("pwatermark",), image_key="img")
    with pytest.raises(UserError, match="has no column img"):
        import_dataset(tmp_path / "a.parquet", tmp_path / "none2", reading=reading)


def test_tfds(tmp_path):
    import tensorflow_datasets as tfds

    folder = make_tfds(
        tmp_path / "a",
        {
            "image": tfds.features.Image(),
            "label": tfds.features.ClassLabel(names=["red_fox", "cat"]),
        },
        [{"image": io.BytesIO(picture(10 * i + 10)), "label": i % 2} for i in range(7)],
    )
    report = import_dataset(folder, tmp_path / "out", unit_size=3)
    assert report["kept"] == 7 and report["shards"] == 3
    found = list(contents(tmp_path / "out").values())
    # TFDS prepares in an order of its own.
    assert sorted(round(mean, -1) for _, mean in found) == [10, 20, 30, 40, 50, 60, 70]
    for texts, mean in found:
        assert texts == ["A photo of cat" if round(mean, -1) % 20 == 0 else "A photo of red fox"]
    (path,) = folder.glob("*train*array_record*")
    data = bytearray(path.read_bytes())
    # In a picture's file of a record, and in what frames another.
    for place in (data.index(picture(30)) + 40, data.index(picture(60)) - 30):
        data[place] ^= 0x10
    path.write_bytes(data)
    damaged = import_dataset(folder, tmp_path / "damaged", unit_size=3)
    assert damaged["dropped"] == {"damaged record": 2} and damaged["kept"] == 5
    kept = [round(mean, -1) for _, mean in contents(tmp_path / "damaged").values()]
    assert sorted(kept) == [10, 20, 40, 50, 70]
    with pytest.raises(UserError, match="no split 'test', only train"):
        import_dataset(folder, tmp_path / "none", split="test")
    with pytest.raises(UserError, match="is not a TFDS data set"):
        import_dataset(tmp_path, tmp_path / "none", kind="tfds")

    several = make_tfds(
        tmp_path / "b",
        {
            "image": tfds.features.Image(),
            "captions": tfds.features.Sequence({"text": tfds.features.Text()}),
        },
        [{"image": io.BytesIO(picture(10)), "captions": [{"text": "one"}, {"text": "ein"}]}],
    )
    import_dataset(several, tmp_path / "several")
    assert [texts for texts, _ in contents(tmp_path / "several").values()] == [["one", "ein"]]


def test_tfds_examples_are_kept_or_counted(tmp_path):
    import tensorflow_datasets as tfds

    folder = make_tfds(
        tmp_path / "a",
        {
            "IMG": tfds.features.Image(),
            "TEXT": tfds.features.Text(),
            "label": tfds.features.ClassLabel(names=["red_fox"]),
        },
        [
            {"IMG": io.BytesIO(picture(10 * i + 10)), "TEXT": text, "label": label}
            for i, (text, label) in enumerate([("ten", -1), (b"\xff", 0), ("", 0), ("", -1)])
        ],
    )
    report = import_dataset(folder, tmp_path / "out")
    found = sorted(texts for texts, _ in contents(tmp_path / "out").values())
    assert found == [["A photo of red fox"], ["ten"]]
    assert report["dropped"] == {"broken caption": 1, "no caption": 1}
    examples = tfds.builder_from_directory(str(folder)).info.splits["train"].num_examples
    assert report["read"] == report["kept"] + 2 == examples
    assert set(report["seen"]) == {"IMG", "TEXT", "label"}


def test_folder(tmp_path):
    folder = tmp_path / "in"
    (folder / "sub").mkdir(parents=True)
    for name, value in (("a", 10), ("b", 20), ("sub/c", 30), ("d", 40)):
        (folder / f"{name}.png").write_bytes(picture(value))
    (folder / "a.txt").write_text("an a")
    (folder / "a.json").write_text(json.dumps({"caption": ["more", "an a"], "pwatermark": 0}))
    (folder / "b.json").write_text(json.dumps({"caption": "a b", "pwatermark": 0.9}))
    (folder / "sub" / "c.txt").write_bytes(b"\xff")
    report = import_dataset(folder, tmp_path / "out", unit_size=2)
    assert {key: texts for key, (texts, _) in contents(tmp_path / "out").items()} == {
        "a.png": ["an a", "more"]
    }
    assert report["dropped"] == {"watermark": 1, "no caption": 1, "broken caption": 1}
    everything = Filters(captions=False, max_watermark=1.0)
    report = import_dataset(folder, tmp_path / "all", filters=everything)
    assert report["kept"] == 3


def test_captions_are_found_wherever_they_are():
    keys = ("text", "captions")
    assert captions({"text": " a\n b ", "captions": ["a b", b"c", {"text": "d"}]}, keys) == (
        "a b", "c", "d",
    )  # fmt: skip
    assert captions({"text": np.array(["x", "y"]), "captions": np.int64(3)}, keys) == ("x", "y")
    assert captions({"text": None, "other": "x"}, keys) == ()
    assert len(captions({"text": "x" * 20_000}, keys)[0]) == 10_000
    assert label_caption("great_white_shark") == "A photo of great white shark"


def test_what_cannot_be_imported_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        import_dataset(tmp_path / "missing", tmp_path / "out")
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(UserError, match="neither a tar nor a parquet"):
        import_dataset(tmp_path / "a.txt", tmp_path / "out")
    with pytest.raises(UserError, match="unknown kind 'zip'"):
        find_units(tmp_path, "zip")
    with pytest.raises(UserError, match="has no webdataset files"):
        find_units(tmp_path, "webdataset")
    write_tar(tmp_path / "a.tar", [("x.jpg", b"x"), ("x.txt", b"x")])
    with pytest.raises(UserError, match=r"nothing of .* was kept \(broken picture 1\)"):
        import_dataset(tmp_path / "a.tar", tmp_path / "out")
    for wrong, message in (
        (dict(max_aspect=0.5), "--max-aspect is 0.5: expected 1 or more"),
        (dict(max_watermark=2.0), "--max-watermark is 2: expected 0 to 1"),
        (dict(max_watermark=float("nan")), "--max-watermark is nan"),
        (dict(min_side=-1), "--min-side is -1: expected at least 0"),
    ):
        with pytest.raises(UserError, match=message):
            Filters(**wrong)
    with pytest.raises(UserError, match="is not empty"):
        import_dataset(tmp_path / "a.tar", tmp_path)


def test_going_on_asks_for_the_same_work(tmp_path):
    write_tar(tmp_path / "a.tar", samples([10]))
    first = import_dataset(tmp_path / "a.tar", tmp_path / "out")
    assert import_dataset(tmp_path / "a.tar", tmp_path / "out") == first
    with pytest.raises(UserError, match="begun with other options"):
        import_dataset(tmp_path / "a.tar", tmp_path / "out", filters=Filters(min_side=1))
    write_tar(tmp_path / "a.tar", samples(range(10, 20)))
    with pytest.raises(UserError, match="begun with other units"):
        import_dataset(tmp_path / "a.tar", tmp_path / "out")


def test_where_nothing_was_kept_another_try_begins_anew(tmp_path):
    path, out = tmp_path / "a.tar", tmp_path / "out"
    write_tar(path, samples([10, 20]))
    for filters in (Filters(min_side=100), Filters(min_side=50)):
        with pytest.raises(UserError, match=r"nothing of .* was kept \(too small 2\)"):
            import_dataset(path, out, filters=filters)
        assert not (out / "dataset.json").exists()
        with pytest.raises(UserError, match="is not a finished data set"):
            ImageShards(out)
    # Not under the hands of someone who is at it.
    with (
        (out / ".lock-1-2").open("a") as lock,
        pytest.raises(UserError, match="another process is writing"),
    ):
        fcntl.flock(lock, fcntl.LOCK_EX)
        import_dataset(path, out)
    assert import_dataset(path, out)["kept"] == 2
    assert list(contents(out)) == ["000010", "000020"]
    with pytest.raises(UserError, match="was begun with other options; give"):
        import_dataset(path, out, filters=Filters(min_side=10))


def test_no_pictures_at_all(tmp_path):
    write_tar(tmp_path / "a.tar", [])
    write_tar(tmp_path / "b.tar", [("readme.md", b"x")])
    with pytest.raises(UserError, match=r"was kept \(no pictures in 2 file\(s\)\)"):
        import_dataset(tmp_path, tmp_path / "out")
    (tmp_path / "a.tar").write_bytes(b"no tar at all" * 100)
    with pytest.raises(UserError, match=r"\(no pictures in 2 file\(s\), damaged files 1\)"):
        import_dataset(tmp_path, tmp_path / "out")


def test_progress_tells_what_is_known(tmp_path, monkeypatch):
    seconds = itertools.count(0.0, 2.0)
    monkeypatch.setattr(importing.time, "perf_counter", lambda: next(seconds))
    lines = []
    for number in range(4):
        (tmp_path / f"{number}.png").write_bytes(picture(10))
        (tmp_path / f"{number}.txt").write_text("x")
    import_dataset(tmp_path, tmp_path / "out", unit_size=4, show=lines.append)
    assert lines == [
        *(f"unit 0/1  {n}/4 pictures  0 pictures/s  about {8 - 2 * n} s left" for n in (1, 2, 3)),
        "unit 0/1  4/4 pictures  0 pictures/s  about 0 s left",
        "unit 1/1  4/4 pictures  0 pictures/s",
    ]
    for number in range(2):
        write_tar(tmp_path / f"{number}.tar", samples([10, 20]))
    lines.clear()
    import_dataset(tmp_path, tmp_path / "tars", kind="webdataset", show=lines.append)
    assert lines[0] == "unit 0/2  1 pictures  0 pictures/s"
    assert "about 6 s left" in lines[2] and lines[-1] == "unit 2/2  4 pictures  0 pictures/s"


def test_hosts_share_the_work(tmp_path):
    (tmp_path / "in").mkdir()
    for number in range(3):
        write_tar(tmp_path / "in" / f"{number}.tar", samples([10 * number + 10]))
    assert import_dataset(tmp_path / "in", tmp_path / "out", part=(0, 2)) is None
    assert not (tmp_path / "out" / "dataset.json").exists()
    report = import_dataset(tmp_path / "in", tmp_path / "out", part=(1, 2))
    assert report["kept"] == 3
    assert list(contents(tmp_path / "out")) == ["000010", "000020", "000030"]


SCRIPT = """
import sys
from instella_jax.preparing import importing
if __name__ == "__main__":
    importing.import_dataset(sys.argv[1], sys.argv[2], workers=int(sys.argv[3]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("workers", [pytest.param(1, marks=pytest.mark.thorough), 2])
def test_killed_imports_lose_and_repeat_nothing(tmp_path, workers):
    (tmp_path / "in").mkdir()
    for shard in range(6):
        numbers = range(40 * shard, 40 * shard + 40)
        write_tar(tmp_path / "in" / f"{shard}.tar", samples(numbers, height=256, width=256))
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, script, tmp_path / "in", tmp_path / "out", str(workers)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    shards = tmp_path / "out" / "shards"
    rng = np.random.default_rng(0)
    kills = 0
    for done in range(4):
        process = subprocess.Popen(command, env=environment)
        while process.poll() is None and len(list(shards.glob("*.json"))) <= done:
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.1))
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.wait()
    assert kills >= 2 and not (tmp_path / "out" / "dataset.json").exists()
    subprocess.run(command, env=environment, check=True)
    assert list(contents(tmp_path / "out")) == [f"{number:06d}" for number in range(240)]
    assert not [path for path in shards.iterdir() if path.name.startswith(".")]
    import_dataset(tmp_path / "in", tmp_path / "undisturbed")
    for path in sorted((tmp_path / "undisturbed" / "shards").glob("*.arrayrecord")):
        assert path.read_bytes() == (shards / path.name).read_bytes()


def test_two_imports_into_one_folder(tmp_path):
    from instella_jax.preparing.jobs import Job, parse_part

    job = Job(tmp_path / "out", {}, ["a", "b"])
    with (
        job.claim((0, 1)) as todo,
        pytest.raises(UserError, match="another process is writing"),
        Job(tmp_path / "out", {}, ["a", "b"]).claim((0, 1)),
    ):
        pass
    assert todo == [0, 1]
    assert parse_part("3/8") == (3, 8)
    for wrong in ("", "1", "8/8", "-1/2", "a/b", "1/0"):
        with pytest.raises(UserError, match="expected I/N"):
            parse_part(wrong)


def test_units_are_read_as_they_were_listed(tmp_path):
    (tmp_path / "x.png").write_bytes(picture(10))
    (tmp_path / "x.txt").write_text("x")
    (unit,) = find_units(tmp_path)
    (tmp_path / "x.png").unlink()
    assert [problem.reason for problem in read_unit(unit)] == ["file cannot be read"]
