"""Real processes that are killed, terminated and started again."""

import random
import shutil
import signal

import numpy as np
import pytest

from benchmarks.faults import (
    Runs,
    finish,
    kill,
    last_step,
    lines,
    newest_step,
    one_sentence,
    same,
    wait_for,
)

RUNS = Runs(steps=20)
STEPS = RUNS.steps
start, run = RUNS.start, RUNS.run

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Workdir of a run that nothing happened to."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    status, out, err = run(workdir)
    assert status == 0, err
    assert f"held out at step {STEPS}" in out
    return workdir


def assert_like(workdir, undisturbed):
    assert lines(workdir) == lines(undisturbed)
    assert same(workdir, undisturbed)


def test_a_run_that_is_killed_4_times_ends_like_one_that_was_not(tmp_path):
    # On a busy machine a run gets further before it is killed: there must be steps enough.
    runs, workdir, whole = Runs(steps=80), tmp_path / "run", tmp_path / "whole"
    assert runs.run(whole)[0] == 0
    assert kill(runs, workdir, 3, random.Random(0))[0] == 3
    # Those may all have been before a checkpoint was complete; this one is after.
    process, before = runs.start(workdir), newest_step(workdir)
    assert wait_for(process, lambda: newest_step(workdir) > before)
    process.send_signal(signal.SIGKILL)
    finish(process)
    saved = newest_step(workdir)
    status, out, err = runs.run(workdir)
    assert status == 0, err
    assert f"continuing from step {saved}" in out
    assert_like(workdir, whole)
    # Half-written checkpoints are cleared away.
    assert sorted(p.name for p in (workdir / "checkpoints").iterdir()) == ["75", "80"]


def test_a_terminated_run_saves_exits_with_0_and_goes_on(undisturbed, tmp_path):
    workdir = tmp_path / "run"
    # It is to be told in time, however busy the machine.
    process = start(workdir, "--config.train.steps=100000", "--config.train.save_every=0")
    assert wait_for(process, lambda: last_step(workdir) >= 3)
    process.send_signal(signal.SIGTERM)
    status, out, err = finish(process)
    assert status == 0, err
    stopped = last_step(workdir)
    assert f"stopped at step {stopped}; run again to continue" in out
    assert (workdir / "checkpoints" / str(stopped)).is_dir()
    whole, more = undisturbed, f"--config.train.steps={max(STEPS, stopped + 1)}"
    if stopped >= STEPS:
        whole = shutil.copytree(undisturbed, tmp_path / "whole")
        assert run(whole, more)[0] == 0
    status, out, err = run(workdir, more)
    assert status == 0 and f"continuing from step {stopped}" in out, err
    assert_like(workdir, whole)


def test_a_finished_run_that_is_run_again_adds_nothing(undisturbed, tmp_path):
    workdir = shutil.copytree(undisturbed, tmp_path / "run")
    before = lines(workdir)
    status, out, err = run(workdir)
    assert status == 0, err
    assert lines(workdir) == before
    assert "step 1/" not in out


def test_damage_is_told_and_the_checkpoint_before_it_used(undisturbed, tmp_path):
    """Of other kinds: tests/checkpoints/test_checkpoint.py and tests/training/test_loop.py."""
    workdir = shutil.copytree(undisturbed, tmp_path / "run")
    newest = workdir / "checkpoints" / str(STEPS)
    files = [path for path in (newest / "state").rglob("*") if path.is_file()]
    path = max(files, key=lambda path: path.stat().st_size)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    status, out, err = run(workdir)
    assert status == 0 and "continuing from step 15" in out, err
    assert f"checkpoint {STEPS} of" in err and path.name in err
    assert newest.with_name(f"{STEPS}.damaged").is_dir() and "Traceback" not in err
    assert_like(workdir, undisturbed)


@pytest.mark.thorough
def test_a_run_goes_on_with_other_numbers_of_devices(undisturbed, tmp_path):
    """There and back again in one process: tests/training/test_loop.py."""
    rare = ("--config.train.eval_every=0", "--config.train.save_every=0")
    for count, end in ((4, 3), (8, 6)):
        devices = (f"--config.run.cpu_devices={count}", f"--config.mesh.data={count}")
        status, out, err = run(tmp_path / "run", *devices, *rare, f"--config.train.steps={end}")
        assert status == 0 and f"{count} cpu device(s)" in out, err
        assert end == 3 or f"continuing from step {end - 3}" in out
    expected, got = (
        {row["step"]: row["train/loss"] for row in lines(workdir) if "train/loss" in row}
        for workdir in (undisturbed, tmp_path / "run")
    )
    assert list(got) == list(expected)[:6]
    np.testing.assert_allclose(list(got.values()), list(expected.values())[:6], rtol=1e-4)


def test_a_second_run_on_a_workdir_is_refused_in_a_sentence(tmp_path):
    process = start(tmp_path, "--config.train.steps=100000")
    try:
        assert wait_for(process, lambda: last_step(tmp_path) >= 1)
        status, _, err = run(tmp_path, "--config.train.steps=100000")
        assert status == 2 and err.count("\n") == 1
        assert err.startswith("error: ") and f"in use by another run (process {process.pid}" in err
        assert process.poll() is None
    finally:
        process.kill()
        finish(process)


@pytest.mark.thorough
def test_a_save_without_room_keeps_the_last_one_and_goes_on_later(undisturbed, tmp_path):
    workdir = tmp_path / "run"
    # As a run leaves it that was killed between two saves.
    shutil.copytree(undisturbed, workdir)
    for made in (f"checkpoints/{STEPS}", "model", "samples"):
        shutil.rmtree(workdir / made, ignore_errors=True)
    status, _, err = run(workdir, largest_file=100)
    assert status == 2 and one_sentence(err), err
    assert "error: a checkpoint cannot be written" in err and "File too large" in err
    assert (workdir / "checkpoints" / "15").is_dir()
    status, out, err = run(workdir)
    assert status == 0 and "continuing from step 15" in out, err
    assert_like(workdir, undisturbed)


@pytest.mark.thorough
def test_a_disk_too_full_for_metrics_is_told_in_a_sentence(tmp_path):
    status, out, err = run(tmp_path, "--config.train.save_every=0", largest_file=8)
    assert status == 2 and one_sentence(err), err
    assert err.splitlines()[-1].startswith(f"error: workdir {tmp_path} cannot be written (File")
    assert last_step(tmp_path) >= 1 and f"step {STEPS}/" not in out


@pytest.mark.thorough
def test_a_run_that_diverges_ends_after_some_skipped_steps(tmp_path):
    options = ("learning_rate=1e38", "warmup_steps=0")
    options = [f"--config.optimizer.{option}" for option in options]
    status, _, err = run(tmp_path, "--config.train.max_skipped=7", *options)
    assert status == 2 and err.startswith("error: 7 steps in a row") and one_sentence(err), err
