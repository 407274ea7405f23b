"""Shards: what is written comes back, splits, damage, mixtures."""

import io
import json
import logging

import numpy as np
import pytest
from PIL import Image

from instella_jax.data.loader import Mixture, make_loader
from instella_jax.data.samples import BadSample
from instella_jax.data.shards import (
    ImageShards,
    Records,
    Shard,
    pack,
    shard_writer,
    unpack,
    write_dataset_file,
)
from instella_jax.data.transforms import EvalTransform, TrainTransform
from instella_jax.errors import UserError


def png(value, height=12, width=16):
    file = io.BytesIO()
    Image.fromarray(np.full((height, width, 3), value, np.uint8)).save(file, "png")
    return file.getvalue()


def write(folder, values, per_shard=10, base=0):
    """Data set of pictures of one colour each, captioned with the colour's number."""
    folder.mkdir()
    shards = []
    for start in range(0, len(values), per_shard):
        path = folder / f"{start:05d}.arrayrecord"
        with shard_writer(path, path.with_suffix(".scratch")) as writer:
            for value in values[start : start + per_shard]:
                header = {"key": f"k{value}", "texts": [str(value), f"ü {value}"], "size": [16, 12]}
                writer.write(header, png(base + value))
        shards.append(Shard(path.name, writer.records, path.stat().st_size))
    write_dataset_file(folder, "images", shards, {})
    return folder


def texts(source):
    return [int(source[i]["texts"][0]) for i in range(len(source))]


def test_a_record_comes_back():
    header, payload = {"key": "ä\n", "texts": ["x"], "size": [1, 2]}, bytes(range(256))
    assert unpack(pack(header, payload)) == (header, payload)
    assert unpack(pack({}, b"")) == ({}, b"")
    for broken in (b"", b"\x01", pack(header, b"")[:-1], b"\xff\xff\xff\xff{}"):
        with pytest.raises(ValueError):
            unpack(broken)


def test_pictures_come_back(tmp_path):
    source = ImageShards(write(tmp_path / "set", list(range(25))))
    assert texts(source) == list(range(25))
    assert source[13]["image"].shape == (12, 16, 3) and (source[13]["image"] == 13).all()
    assert source[13]["texts"] == ("13", "ü 13")
    assert ImageShards(tmp_path / "set", captions=False)[3]["texts"] == ("",)


@pytest.mark.parametrize("count, heldout", [(25, 0.2), (25, 0.02), (7, 0.5), (2, 0.3)])
def test_splits_are_disjoint_and_complete(tmp_path, count, heldout):
    folder = write(tmp_path / "set", list(range(count)))
    train, held = (
        texts(ImageShards(folder, split=split, heldout=heldout)) for split in ("train", "heldout")
    )
    assert not set(train) & set(held) and sorted(train + held) == list(range(count))
    assert len(held) == max(1, -(-count // round(1 / heldout)))


def assert_resumes(loader, build, names):
    """Closes a loader and checks that a new one goes on from its state, by way of JSON."""
    state = json.loads(json.dumps(loader.get_state()))
    after = [next(loader) for _ in range(4)]
    loader.close()
    resumed = build()
    resumed.set_state(state)
    for batch in after:
        again = next(resumed)
        for name in names:
            np.testing.assert_array_equal(batch[name], again[name])
    resumed.close()


def test_a_loader_reads_everything_once_and_resumes(tmp_path):
    source = ImageShards(write(tmp_path / "set", list(range(24))))

    def build():
        return make_loader(source, batch_size=4, seed=1, transform=TrainTransform(8, 8))

    first = build()
    batches = [next(first) for _ in range(6)]
    seen = [int(text.split()[-1]) for batch in batches for text in batch["text"]]
    assert sorted(seen) == list(range(24)) and seen != sorted(seen)
    assert_resumes(first, build, ("image", "text"))


def test_damage_costs_the_record_alone(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    folder = write(tmp_path / "set", list(range(20)))
    path = folder / "00000.arrayrecord"
    data = bytearray(path.read_bytes())
    data[data.index(png(4)) + 20] ^= 1
    path.write_bytes(data)
    with pytest.raises(BadSample, match="record 4 of .* is damaged"):
        ImageShards(folder)[4]
    loader = make_loader(
        ImageShards(folder), batch_size=19, seed=0, repeat=False, transform=EvalTransform(8, 8)
    )
    (batch,) = loader
    assert sorted(map(int, batch["text"])) == [i for i in range(20) if i != 4]
    assert "record 4" in caplog.text
    path.write_bytes(data[:3000])
    bad = 0
    source = ImageShards(folder)
    for index in range(20):
        try:
            source[index]
        except BadSample:
            bad += 1
    assert bad == 10


def test_folders_that_cannot_be_used(tmp_path):
    with pytest.raises(UserError, match="data import"):
        ImageShards(tmp_path)
    folder = write(tmp_path / "set", [1])
    with pytest.raises(UserError, match="holds images, expected codes.*data encode"):
        Records(folder, "codes")
    with pytest.raises(UserError, match="none for train"):
        ImageShards(folder, split="train")
    for wrong in ("test", ""):
        with pytest.raises(UserError, match="unknown split"):
            ImageShards(folder, split=wrong)
    with pytest.raises(UserError, match="heldout is 0.9"):
        ImageShards(folder, heldout=0.9)
    manifest = json.loads((folder / "dataset.json").read_text())
    (folder / "dataset.json").write_text(json.dumps({**manifest, "version": 7}))
    with pytest.raises(UserError, match="version 7"):
        ImageShards(folder)
    (folder / "dataset.json").write_text("{")
    with pytest.raises(UserError, match="is damaged"):
        ImageShards(folder)
    (folder / "dataset.json").write_text(json.dumps(manifest))
    (folder / "00000.arrayrecord").unlink()
    with pytest.raises(UserError, match="lacks 00000.arrayrecord"):
        ImageShards(folder)


@pytest.mark.parametrize("change", [lambda data: data[:-400], lambda data: data + b"x"])
def test_a_shard_of_another_size_is_told_once(tmp_path, caplog, change):
    caplog.set_level(logging.WARNING)
    folder = write(tmp_path / "set", list(range(30)))
    path = folder / "00010.arrayrecord"
    size = path.stat().st_size
    path.write_bytes(change(path.read_bytes()))
    loader = make_loader(
        ImageShards(folder), batch_size=10, seed=0, transform=EvalTransform(8, 8), threads=0
    )
    batches = [next(loader) for _ in range(10)]
    loader.close()
    assert {int(text) for batch in batches for text in batch["text"]} == {
        *range(10), *range(20, 30),
    }  # fmt: skip
    # 150 samples are five epochs of 30, of which 20 can be used.
    assert 40 <= sum(batch["skipped_before"].sum() for batch in batches) <= 60
    (told,) = [record.getMessage() for record in caplog.records]
    sizes = f"{path.stat().st_size:,} bytes instead of {size:,}"
    assert f"00010.arrayrecord of {folder} has {sizes}: its 10 records are not used" in told


def test_a_data_set_of_cut_shards_ends_the_loader(tmp_path):
    folder = write(tmp_path / "set", list(range(30)))
    for path in folder.glob("*.arrayrecord"):
        path.write_bytes(path.read_bytes()[:-1])
    loader = make_loader(
        ImageShards(folder), batch_size=10, seed=0, transform=EvalTransform(8, 8), threads=0
    )
    with pytest.raises(UserError, match="samples in a row could not be used.* bytes instead of"):
        next(loader)
    loader.close()


def test_a_shard_that_cannot_be_written(tmp_path):
    path = tmp_path / "missing" / "a"
    with pytest.raises(UserError, match="cannot be written"), shard_writer(path, path):
        pass


def test_an_interrupted_shard_leaves_nothing(tmp_path):
    with pytest.raises(KeyError), shard_writer(tmp_path / "a", tmp_path / "b") as writer:
        writer.write({}, b"x")
        raise KeyError
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("process_count", [1, 2])
def test_mixtures_keep_their_weights_and_show_everything(tmp_path, process_count):
    parts = (
        ImageShards(write(tmp_path / "a", list(range(12)))),
        ImageShards(write(tmp_path / "b", list(range(100, 106)))),
    )
    seen = {0: [], 1: []}
    for index in range(process_count):
        loader = make_loader(
            Mixture(parts, (3.0, 1.0)),
            batch_size=8,
            seed=2,
            transform=EvalTransform(8, 8),
            process_index=index,
            process_count=process_count,
        )
        for _ in range(6 // process_count):
            batch = next(loader)
            assert np.bincount(batch["source"], minlength=2).tolist() == [6, 2]
            for number, text in zip(batch["source"], batch["text"], strict=True):
                assert (int(text) >= 100) == bool(number)
                seen[int(number)].append(int(text))
        loader.close()
    # 36 draws of 12 and 12 of 6: every epoch shows every picture once.
    assert sorted(seen[0]) == sorted([*range(12)] * 3)
    assert sorted(seen[1]) == sorted([*range(100, 106)] * 2)


def test_a_mixture_resumes_exactly(tmp_path):
    parts = (
        ImageShards(write(tmp_path / "a", list(range(12)))),
        ImageShards(write(tmp_path / "b", list(range(100, 106)))),
    )

    def build():
        return make_loader(
            Mixture(parts, (2.0, 1.0)), batch_size=5, seed=2, transform=TrainTransform(8, 8)
        )

    first = build()
    for _ in range(4):
        next(first)
    assert_resumes(first, build, ("image", "source"))
