"""Tars as `tarfile` and the `tar` command write them: what is in them is kept or counted."""

import collections
import io
import json
import os
import random
import subprocess
import tarfile
import tracemalloc

import numpy as np
import pyarrow
import pytest

from instella_jax.errors import UserError
from instella_jax.preparing import tar_reader
from instella_jax.preparing.filters import Filters
from instella_jax.preparing.import_report import report_lines
from instella_jax.preparing.importing import import_dataset
from instella_jax.preparing.items import Item, NotRead, Problem
from tests.small_data_sets import contents, picture, samples, write_tar

PICTURES = (".jpg", ".png", ".gif", ".webp")
CAPTIONS = (".txt", ".json", ".caption")


def link(name, target, kind=tarfile.LNKTYPE):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def check_counts(report, tars):
    """Each member but folders is kept, part of what is kept, or counted: by `tarfile` itself."""
    pictures, captions, others = 0, set(), collections.Counter()
    keys = set()
    for path in tars:
        with tarfile.open(path) as tar:
            for member in tar:
                folder, base = os.path.split(member.name)
                stem, suffix = os.path.splitext(base)
                key = path, folder, stem
                if member.isdir():
                    continue
                if base.startswith("."):
                    others["hidden"] += 1
                elif suffix.lower() in PICTURES:
                    pictures += 1
                    keys.add(key)
                elif suffix.lower() in CAPTIONS:
                    captions.add(key)
                else:
                    others[suffix or "no suffix"] += 1
    assert report["kept"] + sum(report["dropped"].values()) == report["read"]
    assert report["read"] == pictures + len(captions - keys)
    assert report["not_read"] == others
    for reason, number in report["dropped"].items():
        assert len(report["examples"][reason]) == min(number, 5)


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz", ".tar.bz2", ".tar.xz"])
def test_every_member_is_kept_or_counted(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    with tarfile.open(path, f"w:{suffix.rpartition('.')[2]}" if suffix != ".tar" else "w") as tar:

        def add(name, content):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))

        tar.addfile(link("d", "", tarfile.DIRTYPE))
        add("d/001.5.jpg", picture(10, kind="jpeg"))
        add("d/001.5.txt", b"ten")
        add("d/001.6.jpg", picture(20, kind="jpeg"))
        add("d/001.6.txt", b"twenty")
        add("moving.gif", picture(30, kind="gif"))
        add("moving.caption", b"thirty")
        tar.addfile(link("hard.jpg", "d/001.5.jpg"))
        add("hard.txt", b"ten again")
        tar.addfile(link("d/soft.jpg", "../d/./001.6.jpg", tarfile.SYMTYPE))
        tar.addfile(link("d/soft.txt", "../moving.caption", tarfile.SYMTYPE))
        tar.addfile(link("away.jpg", "/etc/passwd", tarfile.SYMTYPE))
        tar.addfile(link("round.jpg", "round.jpg", tarfile.SYMTYPE))
        add("._hard.jpg", b"\0\5\26\7")
        add(".DS_Store", b"x")
        add("x.npy", b"x")
        add("y.mp4", b"x")
        add("README", b"x")
        add("alone.jpg", picture(40, kind="jpeg"))
        add("words.txt", b"no picture")
        add("words.json", b"{}")
        add("two.png", picture(50))
        add("two.jpg", picture(60, kind="jpeg"))
        add("two.txt", b"sixty")
        add("bad.webp", b"x")
        add("bad.json", b'{"caption": "bad"}')
    report = import_dataset(path, tmp_path / "out")
    assert {key: texts for key, (texts, _) in contents(tmp_path / "out").items()} == {
        "d/001.5": ["ten"], "d/001.6": ["twenty"], "moving": ["thirty"],
        "hard": ["ten again"], "d/soft": ["thirty"], "two": ["sixty"],
    }  # fmt: skip
    means = {key: round(mean, -1) for key, (_, mean) in contents(tmp_path / "out").items()}
    assert means["hard"] == 10 and means["d/soft"] == 20 and means["two"] == 60
    assert report["examples"] == {
        "broken link": ["away", "round"], "no caption": ["alone"],
        "caption without a picture": ["words"],
        "second picture of a sample": ["two.png"], "broken picture": ["bad"],
    }  # fmt: skip
    check_counts(report, [path])
    lines = list(report_lines(report))
    assert lines[0].startswith("kept 6 of 12 pictures")
    assert "  left out, broken link: 2 (away, round)" in lines
    assert any("only within one tar" in line for line in lines)
    assert "  not read, hidden: 2 (._hard.jpg, .DS_Store)" in lines
    assert "  not read, .npy: 1 (x.npy)" in lines


def test_names_with_dots(tmp_path):
    members = [
        ("IMG_2023.05.01.jpg", picture(10, kind="jpeg")), ("IMG_2023.05.01.txt", b"first"),
        ("IMG_2023.05.02.jpg", picture(20, kind="jpeg")), ("IMG_2023.05.02.txt", b"second"),
        # Webdataset: all up to the first dot is the key, where there is no caption of the name.
        ("pair.txt", b"both"), ("pair.left.jpg", picture(30, kind="jpeg")),
        ("pair.right.jpg", picture(40, kind="jpeg")), ("pair.right.json", b'{"caption": "right"}'),
        # A mask is not the picture that the caption is of.
        ("one.jpg", picture(50, kind="jpeg")), ("one.seg.png", picture(60)), ("one.txt", b"one"),
    ]  # fmt: skip
    path = tmp_path / "a.tar"
    for order in (members, members[::-1]):
        write_tar(path, order)
        out = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
        report = import_dataset(path, out)
        assert {key: sorted(texts) for key, (texts, _) in contents(out).items()} == {
            "IMG_2023.05.01": ["first"], "IMG_2023.05.02": ["second"],
            "pair.left": ["both"], "pair.right": ["both", "right"], "one": ["one"],
        }  # fmt: skip
        assert report["examples"] == {"no caption": ["one.seg"]}


def test_captions_named_by_the_whole_file(tmp_path):
    members = [
        ("a.jpg", picture(10, kind="jpeg")), ("a.jpg.json", b'{"caption": "a", "pwatermark": 0.1}'),
        ("b.png", picture(20)), ("b.png.txt", b"long"), ("b.txt", b"short"),
        ("b.json", b'{"caption": "own"}'), ("b.png.json", b'{"caption": "whole"}'),
        ("c.png", picture(30)), ("c.jpg.txt", b"of another picture"),
        ("d.1.png", picture(40)), ("d.1.png.caption", b"dots"),
        ("e.png", picture(50)), ("e.png.json", b'{"caption": "e", "pwatermark": 0.9}'),
    ]  # fmt: skip
    path = tmp_path / "a.tar"
    for number, order in enumerate((members, members[::-1])):
        write_tar(path, order)
        out = tmp_path / str(number)
        report = import_dataset(path, out)
        assert {key: sorted(texts) for key, (texts, _) in contents(out).items()} == {
            "a": ["a"], "b": ["long", "own", "short", "whole"], "d.1": ["dots"],
        }  # fmt: skip
        assert report["examples"] == {
            "no caption": ["c"], "caption without a picture": ["c.jpg"], "watermark": ["e"]
        }  # fmt: skip
    # Where a tar was appended to a tar, each caption goes with the picture of its own part.
    again = [("a.png", picture(10)), ("a.png.txt", b"first")]
    write_tar(path, again + [("a.png", picture(20)), ("a.png.txt", b"second")])
    found = [(item.texts, item.image) for item in tar_reader.read_tar(str(path), ())]
    assert found == [(("first",), picture(10)), (("second",), picture(20))]


@pytest.mark.parametrize("name", ["a.tar.zst", "a.TZST", "a.tar.zstd"])
def test_tars_that_zstd_compressed(tmp_path, name):
    write_tar(tmp_path / "plain.tar", samples(range(0, 200, 10)) + [("x.npy", b"x")])
    plain = (tmp_path / "plain.tar").read_bytes()
    (tmp_path / "plain.tar").unlink()
    frames = [
        pyarrow.compress(part, "zstd", asbytes=True) for part in (plain[:9_999], plain[9_999:])
    ]
    # pzstd writes frames of its own, which say how long the next one is.
    told = b"".join(b"\x50\x2a\x4d\x18\4\0\0\0" + len(f).to_bytes(4, "little") + f for f in frames)
    for number, content in enumerate((b"".join(frames), told)):
        (tmp_path / name).write_bytes(content)
        report = import_dataset(tmp_path / name, tmp_path / f"out{number}")
        assert report["kept"] == 20 and report["not_read"] == {".npy": 1}
        assert not report["dropped"] and not report["damaged_files"]
        for value, (texts, mean) in enumerate(contents(tmp_path / f"out{number}").values()):
            assert texts == [f"picture {10 * value}"] and abs(mean - 10 * value) < 5
    # A file that was cut off is read up to there; one that is damaged, too.
    for content in (told[:-2000], told[:-2000] + bytes(1000) + told[-1000:]):
        (tmp_path / name).write_bytes(content)
        report = import_dataset(tmp_path / name, tmp_path / f"damaged{len(content)}")
        assert report["damaged_files"] == 1 and report["kept"] < 20


def test_equal_names_are_samples_of_their_own(tmp_path):
    twice = samples([10, 20])
    write_tar(tmp_path / "a.tar", twice + twice)
    write_tar(tmp_path / "half.tar", twice[:1] + samples([20]))
    whole = (tmp_path / "a.tar").read_bytes()
    # As `cat` joins them: what is at the end of one does not go with what begins the next.
    joined = whole + (tmp_path / "half.tar").read_bytes() + whole
    (tmp_path / "a.tar").write_bytes(joined)
    (tmp_path / "half.tar").unlink()
    report = import_dataset(tmp_path / "a.tar", tmp_path / "out", filters=Filters(captions=False))
    assert (report["kept"], report["captions"], report["damaged_files"]) == (10, 9, 0)
    found = [item.name for item in tar_reader.read_tar(str(tmp_path / "a.tar"), ())]
    assert collections.Counter(found) == {"000010": 5, "000020": 5}
    # Within one tar, a caption goes with the picture that it comes after.
    write_tar(tmp_path / "b.tar", [twice[0], twice[0], twice[1]])
    report = import_dataset(tmp_path / "b.tar", tmp_path / "other")
    assert report["kept"] == 1 and report["dropped"] == {"no caption": 1}


@pytest.mark.parametrize("pack", ["-cf", "-czf"])
def test_the_order_of_a_folder(tmp_path, pack):
    folder = tmp_path / "in"
    folder.mkdir()
    for number in range(60):
        (folder / f"{number:03d}.png").write_bytes(picture(number))
        (folder / f"{number:03d}.txt").write_text(f"picture {number}")
        (folder / f"{number:03d}.json").write_text(json.dumps({"pwatermark": number // 50}))
    names = [path.name for path in folder.iterdir()]
    random.Random(0).shuffle(names)
    path = tmp_path / "a.tar"
    subprocess.run(["tar", pack, path, "-C", folder, *names], check=True)
    report = import_dataset(path, tmp_path / "out")
    assert {key: texts for key, (texts, _) in contents(tmp_path / "out").items()} == {
        f"{number:03d}": [f"picture {number}"] for number in range(50)
    }
    assert report["dropped"] == {"watermark": 10}
    check_counts(report, [path])


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_memory_is_bounded_whatever_the_order(tmp_path, mode):
    noise = np.random.default_rng(0).bytes(2**20)
    numbers = range(48)
    members = [(f"{number}.jpg", noise) for number in numbers]
    members += [(f"{number}.txt", b"x") for number in reversed(numbers)]
    write_tar(tmp_path / "a.tar", members, mode)
    tracemalloc.start()
    count = sum(len(item.texts) for item in tar_reader.read_tar(str(tmp_path / "a.tar"), ()))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == 48 and peak < 12 * 2**20


def test_captions_of_a_compressed_tar_go_to_disk_where_they_are_many(tmp_path, monkeypatch):
    import tempfile

    monkeypatch.setattr(tar_reader, "_TEXTS_IN_MEMORY", 20)
    members = samples(range(10, 20))
    path = tmp_path / "a.tar.gz"
    write_tar(path, members[1::2] + members[::2], "w:gz")
    found = {item.name: item.texts for item in tar_reader.read_tar(str(path), ())}
    assert found == {f"{number:06d}": (f"picture {number}",) for number in range(10, 20)}

    class Full(tempfile.SpooledTemporaryFile):
        def write(self, content):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(tempfile, "SpooledTemporaryFile", Full)
    with pytest.raises(UserError, match=r"the captions of .* do not fit into .*; free some space"):
        list(tar_reader.read_tar(str(path), ()))


def test_companions_of_macos_tear_nothing_apart(tmp_path):
    members = []
    for name, content in samples(range(10, 15)):
        members += [(f"./._{name}", b"\0\5\26\7"), (f"./{name}", content)]
    write_tar(tmp_path / "a.tar", members)
    report = import_dataset(tmp_path / "a.tar", tmp_path / "out")
    assert list(contents(tmp_path / "out")) == [f"{number:06d}" for number in range(10, 15)]
    assert report["dropped"] == {} and report["not_read"] == {"hidden": 10}


def test_names_that_are_not_utf8(tmp_path):
    path = tmp_path / "a.tar"
    name = b"M\xf6we.png".decode("utf-8", "surrogateescape")
    write_tar(path, [(name, picture(10)), (name[:-4] + ".txt", b"a gull")])
    report = import_dataset(path, tmp_path / "out", filters=Filters())
    assert contents(tmp_path / "out").keys() == {"M\\xf6we"} and report["kept"] == 1
    write_tar(path, [(name, b"x"), (name[:-4] + ".txt", b"a gull"), *samples([10])])
    report = import_dataset(path, tmp_path / "other")
    assert "  left out, broken picture: 1 (M\\xf6we)" in report_lines(report)


def test_what_is_too_large_is_counted_once(tmp_path, monkeypatch):
    monkeypatch.setattr(tar_reader, "MAX_BYTES", 5000)
    members = [*samples([10]), ("big.png", b"x" * 5001), ("big.txt", b"x"), *samples([20])]
    members += [("long.txt", b"x" * 5001), ("long.png", picture(30))]
    for mode in ("w", "w:gz"):
        write_tar(tmp_path / "a.tar", members, mode)
        report = import_dataset(tmp_path / "a.tar", tmp_path / f"out{mode[2:]}")
        assert report["kept"] == 2 and report["examples"] == {"file too large": ["big", "long"]}


def test_special_files_and_names_in_capitals(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        tar.addfile(link("pipe.jpg", "", tarfile.FIFOTYPE))
    with tarfile.open(path, "a") as tar:
        for name, content in (("A.JPG", picture(10, kind="jpeg")), ("A.TXT", b"ten")):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    found = list(tar_reader.read_tar(str(path), ()))
    assert [type(item) for item in found] == [NotRead, Item]
    assert found[0] == NotRead("pipe.jpg", "special file")
    assert isinstance(found[1], Item) and found[1].texts == ("ten",)


def test_a_tar_that_shrinks_after_it_was_listed(tmp_path):
    path = tmp_path / "a.tar"
    write_tar(path, samples(range(10, 13)))
    with tarfile.open(path) as tar:
        start = tar.getmember("000012.png").offset_data
    reading = tar_reader.read_tar(str(path), ())
    assert isinstance(next(reading), Item)
    os.truncate(path, start + 10)
    assert [type(item) for item in reading] == [Item, Problem]


def test_the_second_of_two_captions_is_not_the_first(tmp_path):
    path = tmp_path / "a.tar"
    write_tar(path, [("a.txt", b"old"), ("a.txt", b"new"), ("a.png", picture(10))])
    report = import_dataset(path, tmp_path / "out")
    assert contents(tmp_path / "out")["a"][0] == ["new"]
    assert report["dropped"] == {"caption without a picture": 1}


def test_samples_do_not_cross_from_a_tar_to_the_one_after_it(tmp_path):
    first, second = tmp_path / "a.tar", tmp_path / "b.tar"
    write_tar(first, [("a.jpg", picture(10, kind="jpeg"))])
    write_tar(second, [("a.png", picture(20)), ("a.txt", b"twenty")])
    second.write_bytes(first.read_bytes() + second.read_bytes())
    report = import_dataset(second, tmp_path / "out")
    assert round(contents(tmp_path / "out")["a"][1], -1) == 20
    assert report["dropped"] == {"no caption": 1}


def test_a_compressed_tar_is_never_read_backwards(tmp_path, monkeypatch):
    path = tmp_path / "a.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        tar.addfile(link("soft.png", "z.png", tarfile.SYMTYPE))
        for name, value in (("a.png", 10), ("z.png", 20)):
            info = tarfile.TarInfo(name)
            info.size = len(picture(value))
            tar.addfile(info, io.BytesIO(picture(value)))
        tar.addfile(link("hard.png", "a.png"))
    places = []
    read = tar_reader._Contents._read

    def note(self, start, size):
        places.append(start)
        return read(self, start, size)

    monkeypatch.setattr(tar_reader._Contents, "_read", note)
    found = [item.name for item in tar_reader.read_tar(str(path), ())]
    assert sorted(found) == ["a", "hard", "soft", "z"]
    assert len(places) == 2 and places == sorted(places)


def test_keys_are_named_where_captions_are_in_none_that_is_known(tmp_path):
    members = [("a.png", picture(10)), ("a.json", b'{"title": "ten", "licence": "x"}')]
    write_tar(tmp_path / "a.tar", members)
    with pytest.raises(UserError, match=r"have title, licence: name .* by --caption-keys"):
        import_dataset(tmp_path / "a.tar", tmp_path / "out")
