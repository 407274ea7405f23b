"""Numeric types: every stage trains in each of them, goes on, and can be planned and sampled."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from instella_jax.commands import evaluate
from instella_jax.errors import UserError
from instella_jax.planning import plan
from instella_jax.reporting.metrics import read_metrics
from instella_jax.runtime import sharding
from instella_jax.sampling.load import load_sampler
from instella_jax.sampling.options import options_from_config
from instella_jax.stages import make_stage
from instella_jax.stages.parameters import load_average
from instella_jax.training import loop
from instella_jax.training.step import apply_updates, round_at_random
from tests.uncompiled import compile_nothing

STAGES = ("tokenizer", "diffusion", "ar")
KEYS = ("param_dtype", "output_dtype", "dtype")

make_mesh = sharding.make_mesh


@pytest.fixture(autouse=True)
def on_the_first_device(monkeypatch):
    monkeypatch.setattr(
        sharding, "make_mesh", lambda sizes, *_: make_mesh(sizes, jax.devices()[:1])
    )


def config_of(stage, request):
    config = request.getfixturevalue(f"tiny_{stage}_config")
    config.data.seed = 3
    return config


def types(tree):
    return {x.dtype.name for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)}


def losses(workdir, name="train/loss"):
    return [row[name] for row in read_metrics(workdir) if name in row]


def run_of(config, workdir):
    """A run as it stands after its last checkpoint."""
    stage = make_stage(config)
    mesh = sharding.make_mesh(config.mesh)
    with sharding.use(mesh):
        run = loop._Run(config, workdir, stage, mesh)
        run.state = run.first_state()
        run.loader.close()
        run.checkpoints.close()
        return run


@pytest.mark.thorough
@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_trains_goes_on_and_is_used_in_bfloat16(stage, request, tmp_path):
    config = config_of(stage, request)
    config.run.update(param_dtype="bfloat16", output_dtype="bfloat16")
    if stage == "tokenizer":
        config.run.dtype = "bfloat16"
    config.optimizer.learning_rate = 3e-3
    config.train.update(steps=16, save_every=8, steps_per_call=4, log_every=4, eval_every=8)
    whole = loop.train(config, tmp_path / "whole")
    before, *_, after = losses(tmp_path / "whole", "heldout/loss")
    assert after < before
    # Resuming at step 8 gives the run that was never stopped.
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    shutil.rmtree(tmp_path / "parts" / "checkpoints" / "16")
    assert loop.train(config, tmp_path / "parts") == whole
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")

    run = run_of(config, tmp_path / "whole")
    assert types(run.state.params) == {"bfloat16"}
    assert types((run.state.ema, run.state.opt_state)) == {"float32"}
    # What --mode=eval measures of the run is what the run reported.
    step, average = load_average(run.stage, run.mesh, tmp_path / "whole")
    assert step == 16
    jax.tree.map(np.testing.assert_array_equal, average, run.state.ema)
    measured = evaluate.evaluate(run.stage, average, run.frozen, config, run.mesh)
    assert measured == pytest.approx(whole, rel=1e-5)

    # The model folder is one to start from, and to sample with.
    config.init_from = str(tmp_path / "whole" / "model")
    again = run_of(config, tmp_path / "again")
    assert types(again.state.params) == {"bfloat16"} and types(again.state.ema) == {"float32"}
    for new, old in zip(
        jax.tree.leaves(again.state.params), jax.tree.leaves(run.state.ema), strict=True
    ):
        np.testing.assert_array_equal(new.astype(jnp.float32), old.astype(jnp.bfloat16))
    if stage != "tokenizer":
        sampler, _ = load_sampler(config, None if stage == "ar" else tmp_path / "whole")
        images = sampler(["a cat"], options_from_config(config.sample))
        assert images.shape == (1, 32, 32, 3) and len(np.unique(images)) > 4


@pytest.mark.parametrize("key", KEYS)
def test_bfloat16_is_planned_for(key, request, monkeypatch):
    compile_nothing(monkeypatch)
    config = config_of("tokenizer", request)
    mesh = sharding.make_mesh(config.mesh)
    plain, *_ = plan.measure(config, mesh)
    config.run[key] = "bfloat16"
    memory, *_ = plan.measure(config, mesh)
    share = 2 if key == "param_dtype" else 1
    assert memory.params * share == plain.params
    assert memory.average == plain.average and memory.optimizer == plain.optimizer


@pytest.mark.parametrize("key", ["param_dtype", "dtype"])
@pytest.mark.parametrize("stage", STAGES)
def test_float16_on_a_cpu_is_refused_in_a_sentence(stage, key, request):
    config = config_of(stage, request)
    config.run[key] = "float16"
    with pytest.raises(UserError, match=f"run.{key} is 'float16'.* does not compute on a CPU: use"):
        make_stage(config)


def test_float16_is_planned_for_on_a_cpu(tiny_tokenizer_config, monkeypatch):
    compile_nothing(monkeypatch)
    measure, compiled = plan.measure, []
    monkeypatch.setattr(
        plan, "measure", lambda config, mesh: compiled.append(config) or measure(config, mesh)
    )
    config = tiny_tokenizer_config
    config.run.update(param_dtype="float16", dtype="float16")
    config.plan.devices = 1
    planned = plan.make_plan(config).memory
    assert planned.params * 2 == planned.average
    # As no CPU compiles it.
    (stand_in,) = compiled
    assert (stand_in.run.param_dtype, stand_in.run.dtype) == ("bfloat16", "bfloat16")


def test_rounding_at_random_keeps_the_mean_and_what_is_exact():
    x = np.random.default_rng(0).normal(size=40).astype(np.float32) * np.logspace(-6, 6, 40)
    x = x.astype(np.float32)
    keys = jax.random.split(jax.random.key(0), 4000)
    found = np.asarray(jax.vmap(lambda key: round_at_random(x, key))(keys)).astype(np.float64)
    # Neighbours in bfloat16, which has 8 bits of mantissa, by arithmetic in float64.
    unit = 2.0 ** (np.floor(np.log2(np.abs(x.astype(np.float64)))) - 7)
    low, high = np.floor(x / unit) * unit, np.ceil(x / unit) * unit
    assert ((found == low) | (found == high)).all()
    np.testing.assert_allclose(found.mean(0), x, atol=0, rtol=2**-7 * 0.5 / np.sqrt(4000) * 5)
    exact = np.array([0.0, 1.0, -2.5, 384.0], np.float32)
    np.testing.assert_array_equal(round_at_random(exact, jax.random.key(1)), exact)


def test_steps_too_small_for_bfloat16_are_taken_on_average():
    params = {"w": jnp.full(1000, 1.0, jnp.bfloat16), "b": jnp.ones(3)}
    updates = {"w": jnp.full(1000, 1e-4), "b": jnp.full(3, 1e-4)}
    step = jax.jit(lambda p, key: apply_updates(p, updates, key))
    for number in range(100):
        params = step(params, jax.random.key(number))
    assert types(params["w"]) == {"bfloat16"}
    assert float(params["w"].astype(jnp.float32).mean()) == pytest.approx(1.01, abs=0.001)
    np.testing.assert_allclose(params["b"], 1.01, rtol=1e-5)
    # Rounded to the nearest, nothing would have moved.
    assert jnp.bfloat16(1.0) + jnp.bfloat16(1e-4) == 1.0
