"""Damage to checkpoints, found by their manifests; one run at a time on a workdir."""

import contextlib
import datetime
import logging
import math
import os
import random
import subprocess
import sys
import types

import grain
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from orbax.checkpoint import checkpoint_managers as policies

from instella_jax.checkpoints import manager
from instella_jax.checkpoints.integrity import MANIFEST, find_damage, write_manifest
from instella_jax.checkpoints.manager import Checkpoints, Keep
from instella_jax.checkpoints.params import restore_average
from instella_jax.errors import UserError
from instella_jax.training.step import TrainState
from instella_jax.training.workdir import only_run
from tests.toy_stage import ToyStage


def state_of(step):
    """A state whose values are its step."""
    params = {"w": jnp.full((3, 5), float(step))}
    return TrainState(
        step=jnp.int32(step), skipped=jnp.int32(0), params=params,
        ema={"w": params["w"] + 0.5}, opt_state={"mu": params["w"] * 2}, key=jax.random.key(step),
    )  # fmt: skip


@pytest.fixture
def loader():
    with contextlib.closing(ToyStage().loader("train", batch_size=8)) as loader:
        yield loader


@pytest.fixture
def workdir(tmp_path, loader):
    """With checkpoints of the steps 1, 2 and 3."""
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2, 3):
        next(loader)
        checkpoints.save(state_of(step), loader, step)
        checkpoints.wait()
        checkpoints.check()
    checkpoints.close()
    return tmp_path


def restored(workdir, loader):
    """The step that is restored, which all values must agree with."""
    checkpoints = Checkpoints(workdir)
    try:
        found = checkpoints.restore(state_of(0), loader)
    finally:
        checkpoints.close()
    step = int(found.step)
    jax.tree.map(
        np.testing.assert_array_equal,
        (found.params, found.ema, found.opt_state),
        (state_of(step).params, state_of(step).ema, state_of(step).opt_state),
    )
    return step


def average(workdir):
    like = {"w": jax.ShapeDtypeStruct((3, 5), jnp.float32, sharding=jnp.zeros(()).sharding)}
    step, params = restore_average(workdir, like)
    np.testing.assert_array_equal(params["w"], step + 0.5)
    return step


def flip(path):
    data = bytearray(path.read_bytes())
    data[random.Random(0).randrange(len(data))] ^= 1
    path.write_bytes(bytes(data))


def truncate(path):
    os.truncate(path, path.stat().st_size - 1)


def files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)


def test_every_file_is_in_the_manifest_before_the_checkpoint_counts(workdir):
    for step in ("1", "2", "3"):
        folder = workdir / "checkpoints" / step
        assert find_damage(folder) is None
        listed = MANIFEST, *manager._COMMIT_FILES
        for path in files(folder):
            name = str(path.relative_to(folder))
            assert name in listed or f'"{name}"' in (folder / MANIFEST).read_text()


@pytest.mark.parametrize("harm", [flip, truncate, os.unlink])
def test_damage_to_any_file_is_found(workdir, harm):
    folder = workdir / "checkpoints" / "3"
    paths = [p for p in files(folder) if p.name not in (MANIFEST, *manager._COMMIT_FILES)]
    assert len(paths) > 5
    for path in paths:
        before = path.read_bytes()
        harm(path)
        assert find_damage(folder).startswith(f"{path.relative_to(folder)} ")
        path.write_bytes(before)
    assert find_damage(folder) is None


@pytest.mark.parametrize("harm", [flip, truncate, os.unlink])
def test_what_orbax_writes_as_it_commits_is_not_needed(workdir, loader, harm):
    for name in manager._COMMIT_FILES:
        harm(workdir / "checkpoints" / "3" / name)
    assert restored(workdir, loader) == 3 and average(workdir) == 3


@pytest.mark.parametrize("harm", [flip, truncate, os.unlink])
def test_the_one_before_a_damaged_one_is_used(workdir, loader, harm, caplog):
    arrays = files(workdir / "checkpoints" / "3" / "state")
    largest = max(arrays, key=lambda p: p.stat().st_size)
    harm(largest)
    # Sampling looks on: it changes nothing.
    assert average(workdir) == 2
    assert (workdir / "checkpoints" / "3").is_dir()
    caplog.clear()
    assert restored(workdir, loader) == 2
    name = str(largest.relative_to(workdir / "checkpoints" / "3"))
    assert "checkpoint 3 of" in caplog.text and name in caplog.text
    assert sorted(p.name for p in (workdir / "checkpoints").iterdir()) == ["1", "2", "3.damaged"]
    caplog.clear()
    assert restored(workdir, loader) == 2 and average(workdir) == 2
    assert not caplog.records


def test_without_a_manifest_one_that_restores_is_used_and_that_is_said(workdir, loader, caplog):
    (workdir / "checkpoints" / "3" / MANIFEST).unlink()
    assert restored(workdir, loader) == 3 and average(workdir) == 3
    assert caplog.text.count("bytes could not be checked") == 2


def test_a_whole_one_of_another_shape_stays_where_it_is(workdir, loader):
    other = state_of(0).replace(params={"v": jnp.zeros(4)})
    checkpoints = Checkpoints(workdir)
    with pytest.raises(UserError, match="checkpoint 3 of .* is whole but does not fit"):
        checkpoints.restore(other, loader)
    checkpoints.close()
    assert (workdir / "checkpoints" / "3").is_dir()


def test_an_unreadable_manifest_is_damage(tmp_path):
    (tmp_path / "a").write_text("a")
    write_manifest(tmp_path)
    for text in ("", "[]", "{}", '{"files": {"a": 1}}', '{"files": [1]}'):
        (tmp_path / MANIFEST).write_text(text)
        assert find_damage(tmp_path) == f"{MANIFEST} is not readable"


def test_a_failed_save_is_told_once_and_soon(tmp_path, loader, monkeypatch):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(state_of(1), loader, 1)
    checkpoints.wait()

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(manager, "write_manifest", full)
    checkpoints.save(state_of(2), loader, 2)
    with pytest.raises(UserError, match="No space left on device.*make room"):
        while True:
            checkpoints.check()
    checkpoints.close()
    monkeypatch.undo()
    assert restored(tmp_path, loader) == 1


ABORTED = """
import warnings
from instella_jax.checkpoints.manager import silence_aborted_writes

async def write():
    pass

if SILENT:
    silence_aborted_writes()
write()
warnings.warn("another", RuntimeWarning)
"""


@pytest.mark.parametrize("silent", [True, False])
def test_writes_that_an_error_aborted_print_nothing(silent):
    script = ABORTED.replace("SILENT", str(silent))
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert ended.returncode == 0 and "RuntimeWarning: another" in ended.stderr
    assert ("never awaited" in ended.stderr) is not silent


CHILD = """
import sys
from instella_jax.training.workdir import only_run
with only_run(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_lock_is_held_by_one_and_ends_with_its_process(tmp_path):
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with child:
        assert child.stdout.readline() == b"held\n"
        with pytest.raises(UserError, match=f"in use by another run .process {child.pid} on"):
            with only_run(tmp_path):
                pass
        child.kill()
    with only_run(tmp_path), pytest.raises(UserError, match="in use"), only_run(tmp_path):
        pass
    with only_run(tmp_path):
        pass


def test_without_locks_a_run_goes_on_and_says_so(tmp_path, monkeypatch, caplog):
    import fcntl

    def none(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", none)
    with caplog.at_level(logging.WARNING), only_run(tmp_path):
        pass
    assert "another process at the same work is not noticed" in caplog.text


def kept(workdir, loader, keep, losses=(5, 3, 1, 4, math.nan, 2), restart=None):
    """Steps that stay of a checkpoint for each loss, with a manager of its own after `restart`."""
    checkpoints = Checkpoints(workdir, keep)
    for step, loss in enumerate(losses, 1):
        metrics = None if loss is None else {"loss": float(loss), "psnr": float(loss)}
        checkpoints.save(state_of(step), loader, step, metrics)
        if step == restart:
            checkpoints.close()
            checkpoints = Checkpoints(workdir, keep)
    checkpoints.close()
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())


@pytest.mark.parametrize(
    ("keep", "steps"),
    [
        (Keep(1), [6]),
        (Keep(3), [4, 5, 6]),
        (Keep(1, every=2), [2, 4, 6]),
        (Keep(2, every=4), [4, 5, 6]),
        (Keep(1, best="loss"), [3, 6]),
        (Keep(1, best="psnr"), [1, 6]),
        (Keep(1, every=5, best="loss"), [3, 5, 6]),
        # All of them within the hour: the first one, and the newest.
        (Keep(1, minutes=60), [1, 6]),
    ],
)
def test_what_stays(tmp_path, loader, keep, steps):
    assert kept(tmp_path, loader, keep) == steps
    assert all(find_damage(tmp_path / "checkpoints" / str(step)) is None for step in steps)
    assert restored(tmp_path, loader) == average(tmp_path) == 6


def test_the_best_is_known_after_a_restart_and_without_metrics_none_is(tmp_path, loader):
    losses = (5, 1, None, None, None, 2)
    assert kept(tmp_path / "a", loader, Keep(1, best="loss"), losses, restart=4) == [2, 6]
    # One that was saved before the metric was asked for is not the best.
    assert kept(tmp_path / "b", loader, Keep(2), losses) == [5, 6]
    checkpoints = Checkpoints(tmp_path / "b", Keep(1, best="loss"))
    for step, loss in ((7, 3.0), (8, 4.0)):
        checkpoints.save(state_of(step), loader, step, {"loss": loss})
    checkpoints.close()
    assert sorted(p.name for p in (tmp_path / "b/checkpoints").iterdir()) == ["7", "8"]


def test_one_in_an_hour_stays():
    start = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
    minutes = (0, 20, 59, 61, 100, 130, 131)
    infos = [
        types.SimpleNamespace(step=m, time=start + datetime.timedelta(minutes=m), metrics=None)
        for m in minutes
    ]
    policy = Keep(1, minutes=60).policy()
    stays = policy.should_preserve(infos, context=policies.PreservationContext())
    assert [m for m, stay in zip(minutes, stays, strict=True) if stay] == [0, 61, 130, 131]


def test_checkpoints_of_the_options_before_are_read(tmp_path, loader):
    """Written as this package did before orbax named other options."""
    next(loader)
    position = loader.get_state()
    with ocp.CheckpointManager(
        tmp_path / "checkpoints",
        options=ocp.CheckpointManagerOptions(max_to_keep=3, create=True),
        item_names=("state", "data"),
    ) as before:
        for step in (1, 2):
            before.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state_of(step)),
                    data=grain.checkpoint.CheckpointSave(loader),
                ),
            )
    for step in (1, 2):
        write_manifest(tmp_path / "checkpoints" / str(step), leave_out=manager._COMMIT_FILES)
    next(loader)
    assert restored(tmp_path, loader) == average(tmp_path) == 2
    assert loader.get_state() == position
    # They are counted among those that stay.
    checkpoints = Checkpoints(tmp_path, Keep(2, best="loss"))
    checkpoints.save(state_of(3), loader, 3, {"loss": 1.0})
    checkpoints.close()
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["2", "3"]
