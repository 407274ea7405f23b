"""Real processes that train on data of which some cannot be used."""

import logging

import numpy as np
import pytest
from PIL import Image

from benchmarks.faults import Runs, one_sentence
from instella_jax import cli
from instella_jax.data.shards import ImageShards, pack
from instella_jax.reporting.metrics import read_metrics

RUNS = Runs(steps=8)

pytestmark = pytest.mark.slow


def run_poisoned(workdir, how, first, last, *options):
    """Runs `tests.poisoned`; returns exit status and what it said."""
    return RUNS.run(workdir, *options, module=("tests.poisoned", how, str(first), str(last)))


def column(workdir, name):
    """A metric of every step."""
    return [row[name] for row in read_metrics(workdir) if name in row]


def test_skipped_steps_are_as_if_they_were_not_made(tmp_path):
    # Gradient norms are below 0.4 but for the spikes, of which smooth L1 makes twice that.
    nan, spike, idle = (tmp_path / name for name in ("nan", "spike", "idle"))
    for workdir in (nan, spike, idle):
        options = ("--config.train.spike_norm=0.5", "--config.train.log_every=4")
        status, out, err = run_poisoned(workdir, workdir.name, 3, 5, *options)
        assert status == 0 and "held out at step 8" in out, err
        for step in (4, 8):
            told = f"skipped 1 of the last steps up to step {step}" in out
            assert told == (workdir != idle)
    name, others = "model/tokenizer.safetensors", column(idle, "train/loss")
    # Of the two steps only the first is one that is reported itself.
    assert column(idle, "train/skipped") == [0, 0]
    for workdir in (nan, spike):
        assert column(workdir, "train/skipped") == [1, 1]
        assert column(workdir, "train/loss")[1] == others[1]
        assert (workdir / name).read_bytes() == (idle / name).read_bytes()
    assert column(nan, "train/loss")[0] is None
    assert column(spike, "train/grad_norm")[0] > 0.5


def test_too_many_of_them_end_the_run_in_a_sentence(tmp_path):
    status, _, err = run_poisoned(tmp_path, "nan", 3, 100, "--config.train.max_skipped=4")
    assert status == 2 and one_sentence(err) and err.count("\n") == 1
    assert err.startswith("error: 4 steps in a row up to step 7 had no finite loss")
    assert column(tmp_path, "train/skipped") == [0, 0, 0, 1, 1, 1]


@pytest.fixture
def shards(tmp_path):
    """A data set of 60 pictures, imported."""
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    rng = np.random.default_rng(0)
    for number in range(60):
        picture = rng.integers(0, 256, (40, 40, 3), np.uint8)
        Image.fromarray(picture).save(pictures / f"{number:02d}.png")
        (pictures / f"{number:02d}.txt").write_text("noise", encoding="utf-8")
    arguments = ["data", "import", pictures, tmp_path / "shards", "--workers=1", "--min-side=16"]
    cli.run([str(a) for a in arguments])
    return tmp_path / "shards"


def test_broken_records_are_named_counted_and_cost_nothing_else(shards, tmp_path, caplog):
    source = ImageShards(shards)
    path = shards / source.description["shards"][0].file
    data = bytearray(path.read_bytes())
    records = {number: pack(*source.read(number)) for number in (5, 17, 31)}
    places = {number: data.index(record) for number, record in records.items()}
    # Of a picture's bytes, of the record's header, and of what frames the record before it begins.
    for number, place in ((5, 900), (17, 10), (31, -30)):
        data[places[number] + place] ^= 0x10
    path.write_bytes(data)
    caplog.set_level(logging.ERROR)
    options = ("data.kind=shards", f"data.shards.path={shards}", "data.workers=0")
    status, out, err = RUNS.run(
        tmp_path / "run", "--config.train.steps=20", *(f"--config.{option}" for option in options)
    )
    assert status == 0 and "held out at step 20" in out, err
    told = [line for line in err.splitlines() if "skipped (" in line]
    assert len(told) == 3 and "skipped (3 so far)" in told[-1]
    for number in records:
        assert sum(f"record {number} of {shards} is damaged" in line for line in told) == 1
    assert column(tmp_path / "run", "train/skipped") == [0] * 20
    # 160 samples of 59: each came up in two epochs at least, in four at most.
    assert 6 <= sum(column(tmp_path / "run", "train/skipped_samples")) <= 12
