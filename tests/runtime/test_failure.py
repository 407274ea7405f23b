"""Two real processes of which one fails, or both: both end soon, and say why."""

import os
import re
import signal
import time

import numpy as np
import pytest

from instella_jax.reporting.metrics import read_metrics
from instella_jax.runtime.files import locked
from instella_jax.training.workdir import LOCK
from tests.runtime.test_distributed import LIMIT, finish, losses, run, start

# jax waits 300 seconds for a process that does not come. Most of this is start-up.
SOON = 180

pytestmark = pytest.mark.slow


def wait_for(started, reached):
    """Waits until something is so, which the processes must live to see."""
    end = time.monotonic() + LIMIT
    while not reached():
        assert time.monotonic() < end and all(process.poll() is None for process in started)
        time.sleep(0.1)


def sentence(printed):
    """The error that a process told, in its last line and in no traceback."""
    assert "Traceback" not in printed, printed
    lines = printed.splitlines()
    assert [line for line in lines if line.startswith("error: ")] == lines[-1:], printed
    return lines[-1]


def test_both_refuse_a_workdir_that_another_run_holds(tmp_path):
    """That a run holds its own: tests/training/test_faults.py."""
    with locked(tmp_path / LOCK):
        begin = time.monotonic()
        printed = finish(start(tmp_path, 2), expected=2)
    assert time.monotonic() - begin < SOON
    for text in printed:
        assert f"workdir {tmp_path} is in use by another run" in sentence(text)
    assert f"(process {os.getpid()} on " in sentence(printed[0])
    assert not read_metrics(tmp_path)


@pytest.mark.thorough
def test_a_full_disk_ends_both_and_the_last_checkpoint_goes_on(tmp_path):
    run(tmp_path, 1, "--config.train.steps=4")
    begin = time.monotonic()
    # Less than the list of a checkpoint's arrays takes (71 KiB), which every save writes; how the
    # arrays are spread over files differs from save to save.
    printed = finish(start(tmp_path, 2, "--config.train.steps=40", largest_file=50), expected=2)
    assert time.monotonic() - begin < SOON
    for text in printed:
        assert re.search("a checkpoint cannot be written .*File too large", sentence(text))
    assert (tmp_path / "checkpoints" / "4").is_dir()
    before = losses(tmp_path)
    assert max(before) >= 8
    (printed,) = run(tmp_path, 1, f"--config.train.steps={max(before) + 1}")
    assert "continuing from step 4" in printed
    after = losses(tmp_path)
    np.testing.assert_allclose([after[step] for step in before], list(before.values()), rtol=1e-5)


@pytest.mark.thorough
def test_what_one_cannot_write_ends_the_other_too(tmp_path):
    options = ("--config.train.steps=1000", "--config.train.save_every=0")
    begin = time.monotonic()
    # Only the first process writes metrics.
    first, second = finish(start(tmp_path, 2, *options, largest_file=4), expected=2)
    assert time.monotonic() - begin < SOON
    told = sentence(first).removeprefix("error: ")
    assert told.startswith(f"workdir {tmp_path} cannot be written (File too large)")
    assert sentence(second) == f"error: process 0 of this run ended: {told}"


@pytest.mark.thorough
@pytest.mark.parametrize("killed", [0, 1])
def test_where_one_is_killed_the_other_ends(tmp_path, killed):
    started = start(tmp_path, 2, "--config.train.steps=100000", "--config.train.save_every=0")
    try:
        wait_for(started, lambda: len(losses(tmp_path)) > 2)
        begin = time.monotonic()
        started[killed].send_signal(signal.SIGKILL)
        other = started[1 - killed]
        printed, _ = other.communicate(timeout=LIMIT)
        assert time.monotonic() - begin < SOON and other.returncode
        # Without process 0, which keeps the store, jax itself ends the others at once.
        if killed:
            assert "another process of this run is gone" in sentence(printed)
    finally:
        for process in started:
            process.kill()
            process.communicate()
