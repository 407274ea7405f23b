"""The loop: what a run leaves, and what comes of stopping, going on and failing."""

import contextlib
import errno
import functools
import json
import logging
import math
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from instella_jax.checkpoints import manager
from instella_jax.checkpoints.manager import Checkpoints
from instella_jax.checkpoints.params import restore_average
from instella_jax.errors import UserError
from instella_jax.evaluation.heldout import evaluate, mean_of_rows
from instella_jax.reporting.metrics import read_metrics
from instella_jax.runtime import sharding
from instella_jax.sampling import previews
from instella_jax.sampling.previews import Preview
from instella_jax.stages import make_stage
from instella_jax.stages.base import init_stage
from instella_jax.training import loop, setup
from instella_jax.training.shutdown import StopRequest
from instella_jax.training.step import TrainState
from instella_jax.weights import model_folder
from tests.toy_stage import Points, ToyStage


class Toy(ToyStage):
    """The toy stage, with something that happens at a certain batch of a run."""

    def __init__(self):
        super().__init__()
        self.number, self.moment, self.action = 0, -1, None

    def at(self, moment, action):
        """Calls an action as that batch, counted from 0, is handed out."""
        self.number, self.moment, self.action = 0, moment, action

    def handing_out(self):
        self.number += 1
        if self.number - 1 == self.moment:
            self.action()


@pytest.fixture
def toy(monkeypatch):
    """Makes the loop train the toy stage that it returns."""
    stage, place = Toy(), sharding.place

    def watched(tree, where):
        stage.handing_out()
        return place(tree, where)

    monkeypatch.setattr(sharding, "place", watched)
    monkeypatch.setattr(loop, "make_stage", lambda config: stage)
    monkeypatch.setattr(setup, "init_stage", lambda stage, key: stage.init(key))
    monkeypatch.setattr(loop, "print_overview", lambda params: None)
    monkeypatch.setattr(model_folder, "save", lambda *args, **options: None)
    return stage


@pytest.fixture
def config(tiny_tokenizer_config):
    """What the loop reads, the stage aside."""
    return tiny_tokenizer_config


make_mesh = sharding.make_mesh


def mesh_of(**sizes):
    """A mesh on the first devices."""
    return make_mesh(sizes, jax.devices()[: math.prod(sizes.values())])


@pytest.fixture(autouse=True)
def on_the_first_devices(monkeypatch):
    """A run takes as many of the eight devices as its mesh asks for."""
    monkeypatch.setattr(sharding, "make_mesh", lambda sizes: mesh_of(**sizes))


def lines(workdir):
    """Metrics of a run without what depends on the clock."""
    rows = read_metrics(workdir)
    clock = ("second", "flops", "data_wait")
    return [{k: v for k, v in row.items() if not any(c in k for c in clock)} for row in rows]


def steps(workdir):
    """Steps that have training metrics, in order."""
    return [row["step"] for row in lines(workdir) if "train/loss" in row]


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


def fail():
    raise RuntimeError("the power went out")


def test_a_run_leaves_metrics_of_each_step_and_the_held_out_loss(toy, config, tmp_path):
    result = loop.train(config, tmp_path)
    assert steps(tmp_path) == list(range(1, 9))
    heldout = [row for row in lines(tmp_path) if "heldout/loss" in row]
    assert [row["step"] for row in heldout] == [0, 8]
    assert result == {"loss": heldout[-1]["heldout/loss"]}
    assert {"train/loss", "train/bias", "train/grad_norm", "train/skipped"} <= set(
        lines(tmp_path)[1]
    )
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["4", "8"]


def test_the_best_checkpoint_stays_as_well(toy, config, tmp_path):
    config.train.update(steps=14, save_every=2, eval_every=2)
    config.train.update(keep=1, keep_best="loss", keep_every=6)
    # So fast that the average gets worse again.
    config.optimizer.update(learning_rate=0.7, schedule="constant", warmup_steps=0)
    loop.train(config, tmp_path)
    losses = {row["step"]: row["heldout/loss"] for row in lines(tmp_path) if "heldout/loss" in row}
    candidates = {step: loss for step, loss in losses.items() if step > 0}
    best = min(candidates, key=candidates.__getitem__)
    assert len(candidates) == 7 and best not in (6, 12, 14)
    found = sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir())
    assert found == sorted([best, 6, 12, 14])


def test_the_last_checkpoint_is_ranked_with_the_others(toy, config, tmp_path):
    config.train.update(steps=8, save_every=2, eval_every=2, keep=1, keep_best="loss")
    loop.train(config, tmp_path)
    losses = {row["step"]: row["heldout/loss"] for row in lines(tmp_path) if "heldout/loss" in row}
    assert sorted(losses) == [0, 2, 4, 6, 8] and min(losses, key=losses.__getitem__) == 8
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["8"]


def test_a_metric_to_keep_by_that_is_not_there_is_named(toy, config, tmp_path):
    config.train.update(eval_every=4, save_every=4, keep_best="los")
    with pytest.raises(UserError, match="keep_best is 'los': expected a held-out metric, one of l"):
        loop.train(config, tmp_path)


@pytest.mark.parametrize("every", [1, 2])
def test_a_terminated_run_goes_on_with_the_very_same_losses(toy, config, tmp_path, every):
    config.train.update(steps_per_call=every, log_every=every, eval_every=4)
    whole = loop.train(config, tmp_path / "whole")
    toy.at(5 // every, terminate)
    handler = signal.getsignal(signal.SIGTERM)
    assert loop.train(config, tmp_path / "parts") == {}
    assert signal.getsignal(signal.SIGTERM) is handler
    stopped = steps(tmp_path / "parts")[-1]
    assert stopped == 6
    assert loop.train(config, tmp_path / "parts") == whole
    assert lines(tmp_path / "parts") == lines(tmp_path / "whole")


def test_a_run_that_broke_off_goes_on_from_its_last_checkpoint(toy, config, tmp_path, capsys):
    whole = loop.train(config, tmp_path / "whole")
    for number in (2, 6):
        toy.at(number, fail)
        with pytest.raises(RuntimeError, match="power"):
            loop.train(config, tmp_path / "parts")
    capsys.readouterr()
    assert loop.train(config, tmp_path / "parts") == whole
    assert "continuing from step 4" in capsys.readouterr().out
    assert lines(tmp_path / "parts") == lines(tmp_path / "whole")


def test_a_run_that_is_stopped_before_its_first_step_misses_no_batch(toy, config, tmp_path):
    whole = loop.train(config, tmp_path / "whole")
    evaluate_once = loop.evaluate

    def stop_then(*args):
        terminate()
        return evaluate_once(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "evaluate", stop_then)
        assert loop.train(config, tmp_path / "parts") == {}
    assert [p.name for p in (tmp_path / "parts/checkpoints").iterdir()] == ["0"]
    assert loop.train(config, tmp_path / "parts") == whole
    assert lines(tmp_path / "parts") == lines(tmp_path / "whole")


def test_the_step_compiles_once_and_beside_the_rest(toy, config, tmp_path, caplog):
    config.mesh.data = 2
    jax.config.update("jax_log_compiles", True)  # jax.log_compiles() tells of its own thread alone
    try:
        with caplog.at_level(logging.WARNING):
            loop.train(config, tmp_path)
    finally:
        jax.config.update("jax_log_compiles", False)
    compiled = [r for r in caplog.records if "Finished XLA compilation of jit(step)" in r.message]
    assert len(compiled) == 1 and compiled[0].threadName.startswith("compile")


def test_a_step_that_cannot_be_compiled_ends_the_run_at_once(toy, config, tmp_path):
    traced = []

    def loss(*_):
        traced.append(True)
        raise UserError("nothing to learn")

    toy.loss = loss
    with pytest.raises(UserError, match="nothing to learn"):
        loop.train(config, tmp_path)
    assert len(traced) == 1


def test_a_finished_run_is_not_trained_again(toy, config, tmp_path):
    first = loop.train(config, tmp_path)
    toy.at(0, fail)
    assert loop.train(config, tmp_path) == first
    assert steps(tmp_path) == list(range(1, 9))


def test_a_finished_run_can_be_made_longer(toy, config, tmp_path):
    loop.train(config, tmp_path)
    with config.unlocked():
        config.train.steps = 12
    loop.train(config, tmp_path)
    assert steps(tmp_path) == list(range(1, 13))


def new_run(stage, config, workdir):
    """The parts of a run, before its first step."""
    with sharding.use(mesh_of()):
        run = loop._Run(config, workdir, stage, mesh_of())
        run.state = run.first_state()
        return run


def close(run):
    run.checkpoints.close()
    run.loader.close()


def test_a_saved_state_outlives_the_steps_that_reuse_its_memory(toy, config, tmp_path):
    run = new_run(toy, config, tmp_path)
    with sharding.use(run.mesh):
        batch = sharding.arrays(next(run.loader))
        rows = sharding.place(batch, sharding.batch_sharding(run.mesh, 1))
        state, _ = run.step_function(run.state, {}, rows)
        wanted = jax.tree.map(np.array, (state.params, state.ema, state.opt_state))
        run.checkpoints.save(state, run.loader, 1)
        for _ in range(5):
            state, _ = run.step_function(state, {}, rows)
        run.checkpoints.wait()
        found = run.checkpoints.restore(state, run.loader)
    jax.tree.map(np.testing.assert_array_equal, (found.params, found.ema, found.opt_state), wanted)
    close(run)


def test_metrics_are_fetched_a_step_late_and_nothing_else_is(toy, config, tmp_path, monkeypatch):
    events = []

    class Late:
        """A metric that tells when the host asks for it."""

        def __init__(self, step):
            self.step = step

        def __float__(self):
            events.append(("read", self.step))
            return 0.0

    config.train.save_every = 0
    run = new_run(toy, config, tmp_path)
    step_function = run.step_function

    def step(state, frozen, batch):
        number = len([e for e in events if e[0] == "step"]) + 1
        events.append(("step", number))
        state, _ = step_function(state, frozen, batch)
        return state, {"loss": Late(number), "skipped_in_a_row": 0, "counts": {}}

    run.step_function = step
    run.writer = loop.MetricsWriter(tmp_path)
    monkeypatch.setattr(jax, "device_get", lambda tree: tree)
    with run.writer, sharding.use(run.mesh), jax.transfer_guard("disallow"):
        assert run.loop(0, StopRequest())
    monkeypatch.undo()
    close(run)
    later = [event for n in range(2, 9) for event in (("step", n), ("read", n - 1))]
    assert events == [("step", 1), *later, ("read", 8)]


def test_too_many_steps_that_are_not_finite_end_the_run(toy, config, tmp_path):
    toy.source = Points(broken=range(64))
    config.train.max_skipped = 3
    with pytest.raises(UserError, match="3 steps in a row up to step 3 had no finite loss"):
        loop.train(config, tmp_path)
    assert steps(tmp_path) == [1, 2]


def test_too_large_gradients_are_named_as_such(toy, config, tmp_path):
    config.train.update(max_skipped=3, spike_norm=1e-6)
    with pytest.raises(
        UserError, match="to step 3 had a gradient norm over train.spike_norm=1e-06"
    ):
        loop.train(config, tmp_path)


def test_a_few_steps_that_are_not_finite_are_counted(toy, config, tmp_path):
    toy.source = Points(broken=[0, 1])
    result = loop.train(config, tmp_path)
    skipped = [row["train/skipped"] for row in lines(tmp_path) if "train/loss" in row]
    assert 0 < sum(skipped) < 3 and np.isfinite(result["loss"])


def test_each_held_out_row_counts_alike(toy, config):
    params = {"line": {"w": jnp.arange(4.0), "b": jnp.ones(())}}
    config.eval.batches = 5
    result = evaluate(toy, params, {}, config, mesh_of())
    points = toy.heldout
    wanted = np.mean((points.x @ np.arange(4.0) + 1 - points.y) ** 2)
    assert result["loss"] == pytest.approx(wanted, rel=1e-5)


def test_means_of_batches_merge_without_rounding():
    rng = np.random.default_rng(0)
    values = (1e4 + rng.normal(size=3000)).astype(np.float32)
    rows = rng.integers(1, 65, len(values))
    merged = functools.reduce(lambda a, b: a.merge(b), map(mean_of_rows, values, rows))
    wanted = math.fsum(float(v) * int(n) for v, n in zip(values, rows, strict=True)) / rows.sum()
    assert float(merged.compute()) == pytest.approx(wanted, rel=1e-13)


def test_each_held_out_batch_has_draws_of_its_own_and_always_the_same(toy, config):
    class Drawn(ToyStage):
        def evaluate(self, params, frozen, batch, key):
            return {"draw": jax.random.uniform(key)}

    config.update(seed=3)
    config.eval.update(batch_size=4, batches=2)
    keys = [jax.random.fold_in(jax.random.key(3), index) for index in range(2)]
    wanted = np.mean([jax.random.uniform(key) for key in keys])
    for _ in range(2):
        found = evaluate(Drawn(), {}, {}, config, mesh_of())
        assert found["draw"] == pytest.approx(wanted, rel=1e-6)


def test_evaluation_compiles_once_per_shape(toy, config, tmp_path):
    config.train.eval_every = 2
    loop.train(config, tmp_path)
    assert toy.evaluations_traced == 1


def test_held_out_rows_need_not_split_over_the_devices(toy, config):
    mesh = mesh_of(data=8)
    params = {"line": {"w": jnp.arange(4.0), "b": jnp.ones(())}}
    config.eval.batches = 5
    with sharding.use(mesh):
        many = evaluate(toy, params, {}, config, mesh)
    assert many["loss"] == pytest.approx(
        evaluate(toy, params, {}, config, mesh_of())["loss"], rel=1e-5
    )


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("train.batch_size", 12, "does not split into 8 parts.*multiple of 8"),
        ("train.accumulate", 2, "does not split into 16 parts"),
        ("train.accumulate", 0, "train.accumulate is 0: expected at least 1"),
        ("train.keep_every", -1, "train.keep_every is -1"),
        ("train.keep_minutes", -0.5, "train.keep_minutes is -0.5"),
        ("train.keep_best", "loss", "train.keep_best='loss' needs checkpoints that are evaluated"),
        ("train.steps_per_call", 3, "train.steps=8 is not a multiple of train.steps_per_call=3"),
        ("train.log_every", 0, "train.log_every is 0"),
        ("train.steps", -8, "train.steps is -8"),
        ("eval.batch_size", 0, "eval.batch_size is 0"),
    ],
)
def test_sizes_that_do_not_fit_are_named(config, key, value, message):
    config.update_from_flattened_dict({key: value})
    mesh = mesh_of(data=4, fsdp=2)
    with pytest.raises(UserError, match=message):
        setup.check_sizes(config, mesh)


def test_another_config_is_refused_where_a_run_has_saved(toy, config, tmp_path):
    loop.train(config, tmp_path)
    before = (tmp_path / "config.json").read_bytes(), lines(tmp_path)
    config.model.bits = 16
    with pytest.raises(
        UserError, match="model.bits=8, this one has 16.*takes the run's own config"
    ):
        loop.train(config, tmp_path)
    assert ((tmp_path / "config.json").read_bytes(), lines(tmp_path)) == before


def test_a_run_that_never_saved_leaves_the_workdir_free(toy, config, tmp_path):
    toy.at(2, fail)
    with pytest.raises(RuntimeError):
        loop.train(config, tmp_path)
    config.optimizer.learning_rate = 0.5
    loop.train(config, tmp_path)
    assert steps(tmp_path) == list(range(1, 9))
    assert [row["step"] for row in lines(tmp_path) if "heldout/loss" in row] == [0, 8]


def rates(workdir):
    """Learning rate of each step."""
    rows = [row for row in lines(workdir) if "train/loss" in row]
    return {row["step"]: row["train/learning_rate"] for row in rows}


def test_what_a_run_learns_by_may_change_and_is_said(toy, config, tmp_path, capsys):
    loop.train(config, tmp_path)
    capsys.readouterr()
    config.optimizer.learning_rate = 0.5
    config.train.update(steps=12, batch_size=16)
    loop.train(config, tmp_path)
    said = [line for line in capsys.readouterr().out.splitlines() if "CHANGED" in line]
    assert said[:3] == [
        "CHANGED optimizer.learning_rate: 0.002 -> 0.5",
        "CHANGED train.batch_size: 8 -> 16",
        "CHANGED train.steps: 8 -> 12",
    ]
    assert said[3].startswith("CHANGED at step 8: learning rate 0.002 -> 0.5") and len(said) == 4
    (row,) = [row for row in lines(tmp_path) if "changed" in row]
    assert row["step"] == 8 and row["changed"]["train.steps"] == [8, 12]
    assert row["changed"]["learning rate"] == pytest.approx([0.002, 0.5])
    warm = {1: 0.0, 2: 0.001}
    assert rates(tmp_path) == pytest.approx(
        {step: warm.get(step, 0.002 if step <= 8 else 0.5) for step in range(1, 13)}
    )
    # And once is enough.
    loop.train(config, tmp_path)
    assert "CHANGED" not in capsys.readouterr().out


def cosine(step, peak, warmup, steps, floor):
    """The rate of an update, counted from 0."""
    if step < warmup:
        return peak * step / warmup
    part = min(1.0, (step - warmup) / (steps - warmup))
    return peak * (floor + (1 - floor) * (1 + math.cos(math.pi * part)) / 2)


def test_a_cosine_that_is_made_longer_says_where_its_rate_goes(toy, config, tmp_path, capsys):
    config.optimizer.update(schedule="cosine", final_fraction=0.02, warmup_steps=2)
    loop.train(config, tmp_path)
    capsys.readouterr()
    config.train.steps = 16
    loop.train(config, tmp_path)
    wanted = {n + 1: cosine(n, 0.002, 2, 8 if n < 8 else 16, 0.02) for n in range(16)}
    assert rates(tmp_path) == pytest.approx(wanted, rel=1e-5)
    ends, begins = cosine(8, 0.002, 2, 8, 0.02), wanted[9]
    said = f"CHANGED at step 8: learning rate {ends:.6g} -> {begins:.6g}"
    assert said in capsys.readouterr().out


def test_a_skipped_step_leaves_the_learning_rate_where_it_was(toy, config, tmp_path):
    toy.source = Points(broken=[0, 1])
    config.optimizer.update(schedule="cosine", warmup_steps=2)
    loop.train(config, tmp_path)
    rows = [row for row in lines(tmp_path) if "train/loss" in row]
    updates = np.cumsum([0] + [1 - row["train/skipped"] for row in rows[:-1]])
    assert updates[-1] < 7
    assert list(rates(tmp_path).values()) == pytest.approx(
        [cosine(n, 0.002, 2, 8, 0.02) for n in updates], rel=1e-5
    )


def test_a_finished_run_leaves_everything_as_it_is(toy, config, tmp_path, monkeypatch):
    written = []

    def save(folder, description, *_, **__):
        written.append(folder)
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps({"tokenizer": {}, **description}))

    grid = Preview(np.zeros((1, 8, 8, 3), np.uint8), ["black"])
    monkeypatch.setattr(model_folder, "save", save)
    monkeypatch.setattr(loop, "preview", lambda *_: grid)
    config.eval.pictures = 1
    first = loop.train(config, tmp_path)
    (picture,) = (tmp_path / "samples").iterdir()
    picture.write_bytes(b"what the user made of it")
    before = (tmp_path / "metrics.jsonl").read_bytes()
    assert loop.train(config, tmp_path) == first
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    assert picture.read_bytes() == b"what the user made of it" and len(written) == 1
    # A run that was killed before it had written everything does so.
    picture.unlink()
    (tmp_path / "model" / "config.json").unlink()
    loop.train(config, tmp_path)
    assert picture.exists() and len(written) == 2


def test_calls_of_steps_begin_where_the_checkpoint_is(toy, config, tmp_path):
    toy.at(3, terminate)
    loop.train(config, tmp_path)
    assert steps(tmp_path)[-1] == 4
    config.train.update(steps=18, steps_per_call=3, log_every=3, save_every=3)
    with pytest.raises(UserError, match="from step 4, which is no multiple of .*steps_per_call=3"):
        loop.train(config, tmp_path)


def damage_files(folder):
    for path in folder.rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(folder):
    for path in sorted(folder.rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()


def remove_data(folder):
    empty(folder / "data")
    (folder / "data").rmdir()


def remove_arrays(folder):
    for path in (folder / "state").rglob("*"):
        if path.is_file() and path.parent.name == "d":
            path.unlink()


@pytest.mark.parametrize("harm", [damage_files, empty, remove_data, remove_arrays])
def test_a_damaged_checkpoint_is_set_aside_for_the_one_before_it(
    toy, config, tmp_path, harm, caplog, capsys
):
    whole = loop.train(config, tmp_path)
    before = lines(tmp_path)
    harm(tmp_path / "checkpoints" / "8")
    capsys.readouterr()
    assert loop.train(config, tmp_path) == whole
    assert "continuing from step 4" in capsys.readouterr().out
    assert "checkpoint 8 of" in caplog.text and "DAMAGED" in caplog.text
    assert lines(tmp_path) == before
    names = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert names == ["4", "8", "8.damaged"]
    # And again: the second is not put in the place of the first.
    harm(tmp_path / "checkpoints" / "8")
    assert loop.train(config, tmp_path) == whole
    assert (tmp_path / "checkpoints" / "8.damaged1").is_dir()


def test_where_no_checkpoint_is_whole_nothing_is_touched(toy, config, tmp_path):
    loop.train(config, tmp_path)
    for step in ("4", "8"):
        damage_files(tmp_path / "checkpoints" / step)
    before = lines(tmp_path)
    with pytest.raises(UserError, match="no checkpoint of .* is whole .step 8.*step 4"):
        loop.train(config, tmp_path)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["4", "8"]
    assert lines(tmp_path) == before


def test_a_run_moves_over_8_4_1_and_8_devices(toy, config, tmp_path):
    config.train.update(steps=12, keep=12)
    config.mesh.update(data=8)
    loop.train(config, tmp_path / "whole")
    for stop, (data, fsdp) in ((3, (4, 2)), (6, (2, 2)), (9, (1, 1)), (12, (1, 8))):
        config.mesh.update(data=data, fsdp=fsdp)
        toy.at(2 if stop < 12 else -1, terminate)
        loop.train(config, tmp_path / "moved")
        assert steps(tmp_path / "moved") == list(range(1, stop + 1))
    both = [
        [row["train/loss"] for row in lines(tmp_path / name) if "train/loss" in row]
        for name in ("whole", "moved")
    ]
    np.testing.assert_allclose(*both, rtol=1e-5)


def full(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_disk_that_is_full_while_saving_costs_that_checkpoint_only(
    toy, config, tmp_path, monkeypatch, capsys
):
    whole = loop.train(config, tmp_path / "whole")
    write = manager.write_manifest

    def full_at_8(folder, **options):
        return full() if folder.name.startswith("8.") else write(folder, **options)

    with monkeypatch.context() as patch:
        patch.setattr(manager, "write_manifest", full_at_8)
        with pytest.raises(UserError, match="cannot be written to .*No space left.*make room"):
            loop.train(config, tmp_path / "parts")
    assert (tmp_path / "parts" / "checkpoints" / "4").is_dir()
    capsys.readouterr()
    assert loop.train(config, tmp_path / "parts") == whole
    assert "continuing from step 4" in capsys.readouterr().out
    assert lines(tmp_path / "parts") == lines(tmp_path / "whole")


@pytest.mark.parametrize("what", ["metrics", "checkpoint"])
@pytest.mark.parametrize(
    ("number", "told"),
    [
        (errno.ENOSPC, "No space left on device.* make room and run"),
        (errno.EROFS, "Read-only file system.* make the disk writable and run"),
    ],
)
def test_a_disk_that_takes_nothing_more_is_told_in_a_sentence(
    toy, config, tmp_path, monkeypatch, what, number, told
):
    def fail(*_, **__):
        raise OSError(number, os.strerror(number))

    if what == "metrics":
        monkeypatch.setattr(loop.MetricsWriter, "scalars", fail)
    else:
        monkeypatch.setattr(manager, "write_manifest", fail)
    with pytest.raises(UserError, match=f"cannot be written .*{told}"):
        loop.train(config, tmp_path)


def tiny_state(config, mesh):
    """A real stage's state of ones on a mesh, made without compiling its init."""
    stage = make_stage(config)
    boxed = jax.eval_shape(lambda key: init_stage(stage, key), jax.random.key(0))
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x, s: jax.device_put(rng.normal(size=x.shape).astype(x.dtype), s),
        sharding.values(boxed),
        sharding.tree_shardings(boxed, mesh),
    )
    everywhere = sharding.replicated(mesh)
    return TrainState(
        step=jax.device_put(jnp.int32(7), everywhere),
        skipped=jax.device_put(jnp.int32(1), everywhere),
        params=params,
        ema=jax.tree.map(lambda x: x + 1, params),
        opt_state={"mu": jax.tree.map(lambda x: x * 2, params)},
        key=jax.device_put(jax.random.key(3), everywhere),
    )


@pytest.mark.slow
def test_a_checkpoint_restores_on_another_number_of_devices(toy, config, tmp_path):
    state = original = tiny_state(config, mesh_of(fsdp=8))
    for count in (1, 4):
        checkpoints = Checkpoints(tmp_path / str(count))
        with contextlib.closing(toy.loader("train", batch_size=8)) as loader:
            checkpoints.save(state, loader, 7)
            checkpoints.wait()
            like = tiny_state(config, mesh_of(fsdp=count))
            state = checkpoints.restore(like, loader)
        checkpoints.close()
        for new, wanted in zip(jax.tree.leaves(state), jax.tree.leaves(like), strict=True):
            assert new.sharding == wanted.sharding and len(new.sharding.device_set) == count
    for old, new in zip(jax.tree.leaves(original), jax.tree.leaves(state), strict=True):
        if jnp.issubdtype(old.dtype, jax.dtypes.prng_key):
            old, new = jax.random.key_data(old), jax.random.key_data(new)
        np.testing.assert_array_equal(old, new)


def test_parameters_are_float32_whatever_is_computed_in(tiny_tokenizer_config):
    """Runs in bfloat16: tests/training/test_types.py."""
    config = tiny_tokenizer_config
    config.run.dtype = "bfloat16"
    params = jax.eval_shape(lambda key: init_stage(make_stage(config), key), jax.random.key(0))
    assert {x.dtype for x in jax.tree.leaves(params)} == {np.dtype("float32")}


@pytest.mark.slow
def test_scanned_and_unrolled_depth_give_the_same_gradients(tiny_tokenizer_config):
    config = tiny_tokenizer_config
    config.model.update(encoder_layers=2, decoder_layers=3)
    params = tiny_state(config, mesh_of()).params
    images = np.random.default_rng(1).integers(0, 256, (2, 32, 32, 3), np.uint8)
    found = []
    for unroll, remat in ((False, "none"), (True, "full")):
        config.run.update(unroll=unroll, remat=remat)
        gradient = jax.jit(jax.value_and_grad(make_stage(config).loss, has_aux=True))
        (loss, _), grads = gradient(params, {}, {"image": images}, jax.random.key(0), 0)
        found.append((loss, jax.tree.leaves(grads)))
    (loss, grads), (other_loss, other_grads) = found
    np.testing.assert_allclose(other_loss, loss, rtol=1e-5)
    for a, b in zip(other_grads, grads, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6)


def squared_error(points, line):
    """Mean over points of a line's squared error, in numpy."""
    w, b = np.asarray(line["w"], np.float64), float(line["b"])
    return np.mean((points.x @ w + b - points.y) ** 2)


def test_reports_pictures_and_the_model_are_of_the_average(toy, config, tmp_path, monkeypatch):
    shown, written = [], {}

    @previews.preview.register
    def _(stage: Toy, params, frozen, count):
        shown.append(jax.tree.map(np.array, params))
        return previews.Preview(np.zeros((count, 8, 8, 3), np.uint8), [""] * count)

    monkeypatch.setattr(model_folder, "save", lambda *args, **options: written.update(args[2]))
    config.optimizer.learning_rate = 0.3
    config.train.update(eval_every=4, image_every=4)
    config.eval.update(pictures=2, batches=5)
    loop.train(config, tmp_path)
    saved = {}
    for step in (4, 8):
        with ocp.PyTreeCheckpointer() as checkpointer:
            path = tmp_path / "checkpoints" / str(step) / "state"
            tree = jax.tree.map(
                lambda _: ocp.RestoreArgs(np.ndarray),
                checkpointer.metadata(path).item_metadata.tree,
            )
            state = checkpointer.restore(path, restore_args=tree)
        saved[step] = state
        average, raw = state["ema"], state["params"]
        reported = next(row["heldout/loss"] for row in lines(tmp_path)
                        if row["step"] == step and "heldout/loss" in row)  # fmt: skip
        assert reported == pytest.approx(squared_error(toy.heldout, average["line"]), rel=1e-5)
        assert reported != pytest.approx(squared_error(toy.heldout, raw["line"]), rel=1e-2)
    assert len(shown) == 2
    for pictures, step in zip(shown, (4, 8), strict=True):
        jax.tree.map(np.testing.assert_array_equal, pictures, saved[step]["ema"])
    jax.tree.map(np.testing.assert_array_equal, written, saved[8]["ema"])
    # And so is what later sampling and evaluation read of the workdir.
    where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), saved[8]["ema"]
    )
    step, average = restore_average(tmp_path, like)
    assert step == 8
    jax.tree.map(np.testing.assert_array_equal, average, saved[8]["ema"])
