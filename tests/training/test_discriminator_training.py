"""Training with discriminator and alignment: resumed exactly, and split over devices."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from instella_jax.checkpoints.manager import Checkpoints, Keep
from instella_jax.runtime import sharding
from instella_jax.stages import make_stage
from instella_jax.stages.base import without_critics
from instella_jax.stages.parameters import load_frozen
from instella_jax.training.setup import initial_state, state_shapes
from instella_jax.training.step import jit_step
from tests import vision_folders

pytestmark = pytest.mark.slow
DEVICES = jax.devices()
# From here on both play.
START = 2


@pytest.fixture(params=["patches", pytest.param("features", marks=pytest.mark.thorough)])
def config(request, tiny_tokenizer_config, tmp_path):
    """A network of its own judges, or heads on a frozen one, to which the decoder is aligned."""
    config = tiny_tokenizer_config.copy_and_resolve_references()
    config.loss.adversarial.update(
        kind=request.param, weight=0.5, start=START, width=4, halvings=1, heads=2
    )
    config.loss.balance.weight = 0.1
    if request.param == "features":
        vision_folders.write(tmp_path / "dinov2")
        config.loss.vision = str(tmp_path / "dinov2")
        config.loss.alignment.update(weight=0.5, block=0)
        config.loss.features.update(weight=0.1, warmup=0)
    return config.lock()


def numbers(state):
    """The arrays of a state, on the host."""

    def number(x):
        is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
        return np.asarray(jax.random.key_data(x) if is_key else x)

    return jax.tree.map(number, state)


class Run:
    """A stage on some devices, and its step."""

    def __init__(self, config, **sizes):
        self.mesh = sharding.make_mesh(
            {"data": 1, "fsdp": 1, "tensor": 1, **sizes},
            DEVICES[: int(np.prod(list(sizes.values()), dtype=int))],
        )
        self.config, self.stage = config, make_stage(config)
        with sharding.use(self.mesh):
            self.frozen = load_frozen(self.stage, self.mesh)
            self.state, optimizer = initial_state(self.stage, config, self.mesh)
            self.step = jit_step(self.stage, optimizer, config, self.state)

    def loader(self):
        return self.stage.loader("train", batch_size=8, steps_per_call=1)

    def go(self, loader, steps):
        """Take steps from here; returns the metrics of each."""
        rows = sharding.batch_sharding(self.mesh, leading=1)
        found = []
        with sharding.use(self.mesh):
            for _ in range(steps):
                batch = sharding.place(sharding.arrays(next(loader)), rows)
                self.state, metrics = self.step(self.state, self.frozen, batch)
                found.append(jax.device_get(metrics))
        return found


def test_a_resumed_run_ends_where_an_unbroken_one_does(config, tmp_path):
    run = Run(config)
    begin = jax.tree.map(lambda x: x.copy(), run.state)
    with contextlib.closing(run.loader()) as loader:
        found = run.go(loader, 5)
    whole = numbers(run.state)
    for step, metrics in enumerate(found):
        plays = step >= START
        assert (metrics["discriminator"] > 0) == plays
        assert (metrics["grad_norm_discriminator"] > 0) == plays
        if config.loss.features.weight:
            assert metrics["features"] > 0 and metrics["pull_features"] > 0
            assert metrics["alignment"] > 0 and metrics["grad_norm_alignment"] > 0
            continue
        # Its weight is 0.5 of the pull of all others.
        pull = 0.5 * metrics["pull_pixel"] if plays else 0
        assert metrics["pull_adversarial"] == pytest.approx(pull, rel=1e-3)
    assert np.abs(whole.params["discriminator"]["answers"]).min() > 0
    assert set(without_critics(run.stage, whole.params)) == {"tokenizer"}
    moved = jax.tree.map(lambda a, b: (a != b).any(), whole.params, numbers(begin).params)
    assert all(np.any(jax.tree.leaves(part)) for part in moved.values())
    # What is looked through is no part of what is trained.
    fresh = numbers(load_frozen(run.stage, run.mesh))
    jax.tree.map(np.testing.assert_array_equal, numbers(run.frozen), fresh)

    run.state = begin
    with contextlib.closing(run.loader()) as loader:
        run.go(loader, 3)
        checkpoints = Checkpoints(tmp_path, Keep(2))
        checkpoints.save(run.state, loader, 3)
        checkpoints.close()
    with contextlib.closing(run.loader()) as loader:
        checkpoints = Checkpoints(tmp_path, Keep(2))
        with sharding.use(run.mesh):
            run.state = checkpoints.restore(state_shapes(run.stage, config, run.mesh), loader)
        checkpoints.close()
        run.go(loader, 2)
    jax.tree.map(np.testing.assert_array_equal, whole, numbers(run.state))


@pytest.mark.thorough
def test_eight_devices_do_as_one(config):
    results = []
    for sizes in ({}, dict(data=2, fsdp=4)):
        run = Run(config, **sizes)
        run.state = run.state.replace(step=run.state.step + START)
        with contextlib.closing(run.loader()) as loader:
            (metrics,) = run.go(loader, 1)
        results.append((sharding.fetch(run.state.params), metrics))
    (one, metrics), (eight, same) = results
    for name in ("loss", "discriminator", "adversarial", "grad_norm", "grad_norm_discriminator"):
        assert same[name] == pytest.approx(metrics[name], rel=2e-3, abs=1e-5), name
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), one, eight)
