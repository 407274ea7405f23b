"""The metrics say how many samples could not be used: real broken files and records."""

import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from instella_jax.data.codes import CodeShards
from instella_jax.data.shards import ImageShards, Shard, pack, shard_writer, write_dataset_file
from instella_jax.data.sources import make_split
from instella_jax.reporting.metrics import read_metrics
from instella_jax.runtime import sharding
from instella_jax.training import loop, setup
from instella_jax.weights import model_folder
from tests.toy_stage import ToyStage

RECORDS, BATCH, STEPS = 40, 8, 16
BROKEN = (5, 17, 31)


class Means(ToyStage):
    """Fits a number to the mean of each sample."""

    def __init__(self, config):
        super().__init__()
        self.config = config

    def loader(self, split, **options):
        return make_split(self.config.data, split, captions=True, **options)

    def errors(self, params, batch):
        samples = batch["code" if "code" in batch else "image"].astype(jnp.float32) / 255
        return params["line"]["b"] - samples.mean(range(1, samples.ndim))

    def loss(self, params, frozen, batch, key, step):
        return jnp.mean(jnp.square(self.errors(params, batch))), {}


@pytest.fixture
def config(tiny_tokenizer_config, monkeypatch):
    """A config with which the loop trains `Means` on one device."""
    config, make_mesh = tiny_tokenizer_config, sharding.make_mesh
    config.train.update(steps=STEPS, batch_size=BATCH, steps_per_call=2, log_every=4, save_every=8)
    config.data.update(workers=0, image_size=16)
    monkeypatch.setattr(sharding, "make_mesh", lambda sizes: make_mesh(sizes, jax.devices()[:1]))
    monkeypatch.setattr(loop, "make_stage", Means)
    monkeypatch.setattr(setup, "init_stage", lambda stage, key: stage.init(key))
    monkeypatch.setattr(loop, "print_overview", lambda params: None)
    monkeypatch.setattr(model_folder, "save", lambda *args, **options: None)
    return config


def png(number):
    """A picture of one colour."""
    file = io.BytesIO()
    Image.fromarray(np.full((20, 24, 3), number, np.uint8)).save(file, "png")
    return file.getvalue()


def make_folder(folder):
    """Pictures with their numbers as captions."""
    folder.mkdir()
    for number in range(RECORDS):
        (folder / f"{number}.png").write_bytes(png(number))
        (folder / f"{number}.txt").write_text(str(number), encoding="utf-8")


def make_records(folder, content, payload, details):
    """A data set of one shard; payload(number) makes a record."""
    folder.mkdir()
    path = folder / "0.arrayrecord"
    with shard_writer(path, path.with_suffix(".scratch")) as writer:
        for number in range(RECORDS):
            header = {"key": str(number), "texts": [str(number)], "size": [24, 20]}
            writer.write(header, payload(number))
    shards = [Shard(path.name, writer.records, path.stat().st_size)]
    write_dataset_file(folder, content, shards, details)


def make_shards(folder):
    make_records(folder, "images", png, {})


def make_codes(folder, lacking=()):
    details = {"num_tokens": 4, "bits": 8, "variants": 2, "image_size": 16, "tokenizer": ""}
    make_records(folder, "codes", lambda n: b"" if n in lacking else bytes([n] * 8), details)


def flip_bits(source, places):
    """Damages records: a bit so many bytes after where each begins."""
    path = source.folder / "0.arrayrecord"
    data = bytearray(path.read_bytes())
    starts = {number: data.index(pack(*source.read(number))) for number in places}
    for number, place in places.items():
        data[starts[number] + place] ^= 0x10
    path.write_bytes(data)


def break_folder(folder):
    """Cuts off a picture, makes another one of nonsense, and takes the caption of a third."""
    (folder / "5.png").write_bytes((folder / "5.png").read_bytes()[:60])
    (folder / "17.png").write_bytes(b"no picture")
    (folder / "31.txt").write_text(" \n", encoding="utf-8")


def break_shards(folder):
    """Damages a picture, a header, and what frames a record."""
    flip_bits(ImageShards(folder), {5: 90, 17: 10, 31: -30})


def break_codes(folder):
    """A picture that could not be encoded, and damage in a code and in a header."""
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    make_codes(folder, lacking=(5,))
    source = CodeShards(folder)
    flip_bits(source, {17: len(pack(*source.read(17))) - 2, 31: 10})


def order(config):
    """Numbers of the samples of each row, batch after batch, while nothing is broken."""
    loader = make_split(config.data, "train", captions=True, batch_size=BATCH)
    batches = [[int(text) for text in next(loader)["text"]] for _ in range(3 * STEPS)]
    loader.close()
    return np.array(batches).T


def skipped_by(rows, broken):
    """How many of each row are left out before step 1, 2 ...: int [STEPS]."""
    good = [np.flatnonzero(~np.isin(row, broken))[:STEPS] for row in rows]
    return np.sum([np.diff(places, prepend=-1) - 1 for places in good], axis=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "make", "damage"),
    [
        ("folder", make_folder, break_folder),
        ("shards", make_shards, break_shards),
        ("codes", make_codes, break_codes),
    ],
)
def test_metrics_count_what_could_not_be_used(config, tmp_path, kind, make, damage, caplog):
    folder = tmp_path / "data"
    make(folder)
    config.data.kind = kind
    config.data[kind].update(path=str(folder), heldout=0.1)
    rows = order(config)
    assert np.isin(BROKEN, rows).all()
    damage(folder)
    # The second run goes on from the checkpoint of the first.
    for config.train.steps in (STEPS // 2, STEPS):
        loop.train(config, tmp_path / "run")
    lines = [row for row in read_metrics(tmp_path / "run") if "train/loss" in row]
    assert [row["step"] for row in lines] == list(range(4, STEPS + 1, 4))
    expected = skipped_by(rows, BROKEN).reshape(-1, 4).sum(axis=1).tolist()
    assert [row["train/skipped_samples"] for row in lines] == expected
    assert sum(expected) >= 6
    assert "skipped (3 so far)" in caplog.text and "skipped (4 so far)" not in caplog.text
