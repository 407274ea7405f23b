"""Real processes that are killed, terminated and started again."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from instella_jax.metrics import read_metrics

ROOT = Path(__file__).resolve().parents[1]
STEPS = 40
LIMIT = 300

pytestmark = pytest.mark.slow


def start(workdir):
    """Starts the same small run as any other call."""
    command = [
        sys.executable, "-m", "instella_jax.main", "--config=tests/tiny_tokenizer.py",
        f"--workdir={workdir}", f"--config.train.steps={STEPS}", "--config.train.save_every=5",
        "--config.train.eval_every=10",
    ]  # fmt: skip
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process):
    """Waits; returns exit status, standard output and standard error."""
    out, err = process.communicate(timeout=LIMIT)
    return process.returncode, out, err


def run(workdir):
    return finish(start(workdir))


def lines(workdir):
    """Metrics without what depends on the clock."""
    rows = read_metrics(workdir)
    clock = ("second", "flops", "data_wait")
    return [{k: v for k, v in row.items() if not any(c in k for c in clock)} for row in rows]


def last_step(workdir):
    return max((row["step"] for row in lines(workdir)), default=-1)


def wait_for(process, workdir, step):
    """Waits until a run has told of a step; False if it ends before."""
    end = time.monotonic() + LIMIT
    while time.monotonic() < end:
        if process.poll() is not None:
            return False
        if last_step(workdir) >= step:
            return True
        time.sleep(0.005)
    raise TimeoutError(f"step {step} was not reached in {LIMIT} s")


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
    for name in ("tokenizer.safetensors", "config.json"):
        assert (workdir / "model" / name).read_bytes() == (
            undisturbed / "model" / name
        ).read_bytes()


def test_killed_runs_end_like_one_that_was_not(undisturbed, tmp_path):
    workdir = tmp_path / "run"
    rng = random.Random(0)
    kills = 0
    for progress in (0, rng.randint(1, 6), rng.randint(3, 9), rng.randint(3, 9)):
        process = start(workdir)
        if wait_for(process, workdir, max(0, last_step(workdir)) + progress):
            # Anywhere in a step, a save or the writing of a line.
            time.sleep(rng.uniform(0, 0.05))
            process.kill()
            kills += 1
        finish(process)
    assert kills == 4 and last_step(workdir) < STEPS
    status, out, err = run(workdir)
    assert status == 0, err
    assert "continuing from step" in out
    assert_like(workdir, undisturbed)
    # Half-written checkpoints are cleared away.
    assert sorted(p.name for p in (workdir / "checkpoints").iterdir()) == ["35", "40"]


def test_a_terminated_run_saves_exits_with_0_and_goes_on(undisturbed, tmp_path):
    workdir = tmp_path / "run"
    process = start(workdir)
    assert wait_for(process, workdir, 7)
    process.send_signal(signal.SIGTERM)
    status, out, err = finish(process)
    assert status == 0, err
    stopped = last_step(workdir)
    assert f"stopped at step {stopped}; run again to continue" in out and stopped < STEPS
    assert (workdir / "checkpoints" / str(stopped)).is_dir()
    status, out, err = run(workdir)
    assert status == 0 and f"continuing from step {stopped}" in out, err
    assert_like(workdir, undisturbed)


def test_a_finished_run_repeats_its_result_only(undisturbed, tmp_path):
    workdir = shutil.copytree(undisturbed, tmp_path / "run")
    before = lines(workdir)
    status, out, err = run(workdir)
    assert status == 0, err
    assert lines(workdir)[: len(before)] == before
    assert lines(workdir)[len(before) :] == [before[-1]]
    assert "step 1/" not in out


def test_a_damaged_newest_checkpoint_is_told_in_a_sentence(undisturbed, tmp_path):
    workdir = shutil.copytree(undisturbed, tmp_path / "run")
    newest = workdir / "checkpoints" / str(STEPS)
    for path in (newest / "state").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    status, _, err = run(workdir)
    assert status == 2 and err.startswith("error: ") and "Traceback" not in err
    assert f"checkpoint {STEPS} of" in err and "remove that folder" in err
    shutil.rmtree(newest)
    status, out, err = run(workdir)
    assert status == 0 and "continuing from step 35" in out, err
    assert_like(workdir, undisturbed)
