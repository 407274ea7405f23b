"""The optimizers, against numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from instella_jax.errors import UserError
from instella_jax.runtime import sharding
from instella_jax.stages import make_stage
from instella_jax.training.optimizer import make_optimizer
from instella_jax.training.setup import state_shapes
from tests import tiny_diffusion

SETTINGS = dict(
    kind="muon", learning_rate=0.01, warmup_steps=0, schedule="constant", final_fraction=0.1,
    b1=0.9, b2=0.99, eps=1e-8, weight_decay=0.0, clip=1e9,
    muon=dict(learning_rate=0.5, momentum=0.9, ns_steps=5, exclude=()),
)  # fmt: skip


def orthogonalised(matrix, rounds):
    """Newton and Schulz's iteration with the quintic of Jordan et al. (2024), in float64."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix / np.linalg.norm(matrix)
    for _ in range(rounds):
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    return x


def first_update(params, grads, **settings):
    optimizer = make_optimizer(ConfigDict({**SETTINGS, **settings}), steps=10)
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    return updates


@pytest.mark.parametrize("ns_steps", [3, 5])
def test_muon_orthogonalises_each_layer_and_scales_it_for_its_width(ns_steps):
    rng = np.random.default_rng(0)
    grads = {
        "blocks": {"wide": {"kernel": rng.normal(size=(3, 4, 16))}},
        "out": {"kernel": rng.normal(size=(4, 16))},
    }
    grads = jax.tree.map(jnp.float32, grads)
    muon = dict(learning_rate=0.5, momentum=0.9, ns_steps=ns_steps, exclude=())
    updates = first_update(jax.tree.map(jnp.zeros_like, grads), grads, muon=muon)
    for layer in range(3):
        gradient = np.float64(grads["blocks"]["wide"]["kernel"][layer])
        expected = -0.5 * 2.0 * orthogonalised(gradient, ns_steps)  # sqrt(16 / 4)
        found = updates["blocks"]["wide"]["kernel"][layer]
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)
        if ns_steps == 5:
            assert np.all(np.abs(np.linalg.svd(found / -1.0)[1] - 1.0) < 0.35)
    # Adam's first step is the sign of the gradient.
    np.testing.assert_allclose(
        updates["out"]["kernel"], -0.01 * np.sign(grads["out"]["kernel"]), rtol=1e-3
    )


def test_both_learning_rates_follow_the_schedule():
    grads = {"blocks": {"kernel": jnp.ones((1, 2, 2))}, "bias": jnp.ones(2)}
    params = jax.tree.map(jnp.zeros_like, grads)
    optimizer = make_optimizer(ConfigDict({**SETTINGS, "warmup_steps": 4}), steps=10)
    state, sizes = optimizer.init(params), []
    for _ in range(6):
        updates, state = optimizer.update(grads, state, params)
        sizes.append([float(optax.tree.norm(part)) for part in jax.tree.leaves(updates)])
    relative = np.array(sizes) / sizes[-1]
    np.testing.assert_allclose(relative[:, 0], [0, 0.25, 0.5, 0.75, 1, 1], atol=0.02)
    np.testing.assert_allclose(relative[:, 1], [0, 0.25, 0.5, 0.75, 1, 1], atol=0.02)


def test_the_momentum_of_muon_is_sharded_like_its_kernels():
    config = tiny_diffusion.get_config()
    config.optimizer.kind = "muon"
    mesh = sharding.make_mesh(dict(data=2, fsdp=2, tensor=2))
    state = state_shapes(make_stage(config), config, mesh)
    where = {
        jax.tree_util.keystr(path): leaf.sharding.spec
        for path, leaf in jax.tree_util.tree_leaves_with_path(state.opt_state)
    }
    kernels = [name for name in where if "muon" in name and name.endswith("['q']['kernel']")]
    assert kernels
    params = state.params["generator"]["blocks"]["attention"]["q"]["kernel"]
    assert all(where[name] == params.sharding.spec for name in kernels)
    # Nobody keeps moments for a parameter that the other one takes.
    held = sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(state.opt_state))
    trained = jax.tree.leaves(state.params)
    stacked = sum(np.prod(x.shape) for x in trained if x.ndim == 3)
    assert held < 2.1 * sum(np.prod(x.shape) for x in trained) - 0.9 * stacked


def test_excluded_layers_are_adamws():
    grads = {"blocks": {name: {"kernel": jnp.ones((2, 3, 3))} for name in ("q", "modulation")}}
    muon = dict(learning_rate=0.5, momentum=0.9, ns_steps=5, exclude=("modulation",))
    updates = first_update(jax.tree.map(jnp.zeros_like, grads), grads, muon=muon)["blocks"]
    np.testing.assert_allclose(updates["modulation"]["kernel"], -0.01, rtol=1e-3)
    assert np.abs(updates["q"]["kernel"]).max() > 0.1


def test_an_excluded_layer_that_is_not_there_is_an_error():
    stacked, plain = {"kernel": jnp.zeros((2, 3, 3))}, {"kernel": jnp.zeros((3, 3))}
    params = {"blocks": {"q": stacked}, "out": plain}
    muon = dict(learning_rate=0.5, momentum=0.9, ns_steps=5, exclude=("out",))
    with pytest.raises(UserError, match="exclude has out, .*: expected some of blocks, q$"):
        first_update(params, params, muon=muon)
