"""Training with a discriminator: resumed exactly, split over devices, left out of the model."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from instella_jax.checkpoints.params import restore_average
from instella_jax.runtime import sharding
from instella_jax.stages import make_stage
from instella_jax.stages.base import init_stage
from instella_jax.training.loop import train
from instella_jax.training.setup import initial_state
from instella_jax.training.step import jit_step

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_compile")]


@pytest.fixture
def config(tiny_tokenizer_config):
    config = tiny_tokenizer_config.copy_and_resolve_references()
    config.loss.adversarial.update(weight=0.5, start=2, width=8, halvings=2)
    config.loss.update(tail_drop=0.5)
    config.loss.balance.weight = 0.1
    config.train.steps = 6
    config.train.save_every = 3
    return config.lock()


def average(workdir, config):
    stage = make_stage(config)
    mesh = sharding.make_mesh(config.mesh)
    boxed = jax.eval_shape(lambda key: init_stage(stage, key), jax.random.key(0))
    return restore_average(workdir, sharding.placed(boxed, mesh))


def lines(workdir):
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row for row in rows if "train/loss" in row}


def test_a_resumed_run_ends_where_an_unbroken_one_does(config, tmp_path, monkeypatch):
    make_mesh = sharding.make_mesh
    monkeypatch.setattr(sharding, "make_mesh", lambda sizes: make_mesh(sizes, DEVICES[:1]))
    train(config, tmp_path / "whole")
    half = config.copy_and_resolve_references()
    half.train.steps = 3
    train(half.lock(), tmp_path / "broken")
    train(config, tmp_path / "broken")
    (step, whole), (other, broken) = (
        average(tmp_path / name, config) for name in ("whole", "broken")
    )
    assert step == other == 6 and set(whole) == {"tokenizer", "discriminator"}
    jax.tree.map(np.testing.assert_array_equal, whole, broken)
    found = lines(tmp_path / "whole")
    # Its start: before it there is no game.
    assert found[2]["train/discriminator"] == 0 < found[3]["train/discriminator"]
    assert found[2]["train/pull_adversarial"] == 0
    assert found[4]["train/pull_adversarial"] == pytest.approx(
        0.5 * found[4]["train/pull_pixel"], rel=1e-4
    )
    model = tmp_path / "whole" / "model"
    assert sorted(p.name for p in model.iterdir()) == ["config.json", "tokenizer.safetensors"]
    assert not any("conv_" in name for name in load_file(model / "tokenizer.safetensors"))


DEVICES = jax.devices()


@pytest.mark.parametrize("axes", [dict(data=8), dict(data=2, fsdp=4)])
def test_eight_devices_do_as_one(config, axes):
    batch = next(make_stage(config).loader("train", batch_size=8, steps_per_call=1))
    results = []
    for sizes, devices in ((dict(data=1, fsdp=1), 1), (dict(data=1, fsdp=1) | axes, 8)):
        mesh = sharding.make_mesh({"tensor": 1, **sizes}, DEVICES[:devices])
        stage = make_stage(config)
        with sharding.use(mesh):
            state, optimizer = initial_state(stage, config, mesh)
            state = state.replace(step=state.step + 5)  # when all losses count
            step = jit_step(stage, optimizer, config, state)
            rows = sharding.place(sharding.arrays(batch), sharding.batch_sharding(mesh, leading=1))
            state, metrics = step(state, {}, rows)
            results.append((sharding.fetch(state.params), jax.device_get(metrics)))
    (one, metrics), (eight, same) = results
    for name in ("loss", "discriminator", "adversarial", "grad_norm", "grad_norm_discriminator"):
        assert same[name] == pytest.approx(metrics[name], rel=2e-3, abs=1e-5), name
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), one, eight)
