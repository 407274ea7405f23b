"""Two real processes against one: in buckets, on shards of which some records are broken."""

import re

import numpy as np
import pytest
from PIL import Image

from instella_jax.data.shards import ImageShards, Shard, pack, shard_writer, write_dataset_file
from instella_jax.reporting.metrics import read_metrics
from tests.runtime.test_distributed import losses, run

pytestmark = pytest.mark.thorough

BROKEN = (3, 8, 12, 26)
STEPS, CHANGE = 10, 7


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Workdirs and what was printed: one process; two, after which one goes on."""
    folder = tmp_path_factory.mktemp("runs")
    write_broken(folder / "shards", folder / "picture.png")
    options = (
        "--config.data.kind=shards", f"--config.data.shards.path={folder / 'shards'}",
        "--config.data.buckets=32x32,32x64", "--config.data.workers=0",
    )  # fmt: skip
    one, two = folder / "one", folder / "two"
    alone = run(one, 1, *options, f"--config.train.steps={STEPS}")
    both = run(two, 2, *options, f"--config.train.steps={CHANGE}")
    later = run(two, 1, *options, f"--config.train.steps={STEPS}")
    return (one, alone), (two, both + later)


def write_broken(folder, picture):
    """A data set of 30 pictures of two shapes, with a flipped bit in some records."""
    folder.mkdir()
    path, rng = folder / "0.arrayrecord", np.random.default_rng(0)
    with shard_writer(path, path.with_suffix(".scratch")) as writer:
        for number in range(30):
            size = ((40, 40), (80, 40))[number % 2]
            colours = Image.fromarray(rng.integers(0, 256, (3, 4, 3), np.uint8))
            colours.resize(size, Image.Resampling.BICUBIC).save(picture)
            header = {"key": str(number), "texts": ["x"], "size": size}
            writer.write(header, picture.read_bytes())
    write_dataset_file(
        folder, "images", [Shard(path.name, writer.records, path.stat().st_size)], {}
    )
    source, data = ImageShards(folder), bytearray(path.read_bytes())
    for number in BROKEN:
        data[data.index(pack(*source.read(number))) + 200] ^= 0x10
    path.write_bytes(data)


def counted(workdir, name):
    """A count of each step."""
    return [row[f"train/{name}"] for row in read_metrics(workdir) if "train/loss" in row]


def named(printed):
    """The records that a process said it skips."""
    return {int(number) for number in re.findall(r"skipped .*: record (\d+) of", printed)}


def test_two_processes_and_then_one_train_in_buckets_as_one(runs):
    (one, _), (two, printed) = runs
    assert "saved by 2 process(es), 1 go on" in printed[-1]
    expected, got = losses(one), losses(two)
    assert list(got) == list(expected) == list(range(1, STEPS + 1))
    np.testing.assert_allclose(list(got.values()), list(expected.values()), rtol=1e-5)
    shapes = [counted(one, f"samples_{shape}") for shape in ("32x32", "32x64")]
    assert shapes == [counted(two, f"samples_{shape}") for shape in ("32x32", "32x64")]
    assert all(map(any, shapes)) and [*map(sum, zip(*shapes, strict=True))] == [8] * STEPS


def test_two_processes_skip_the_broken_records_that_one_skips(runs):
    (one, (alone,)), (two, (first, second, _)) = runs
    skipped = counted(one, "skipped_samples")
    assert counted(two, "skipped_samples") == skipped
    # 10 batches of 8 are over two epochs of 29 records.
    assert sum(skipped[CHANGE:]) > 0 and sum(skipped) >= 2 * len(BROKEN)
    assert named(alone) == named(first) | named(second) == set(BROKEN)
    assert named(first) and named(second)
