"""Weight, start and warm-up of a loss; several as one, against plain sums."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from instella_jax.losses.weighing import Term, from_start, ramp, weigh


def section(weight, start=0, warmup=0):
    return ConfigDict(dict(weight=weight, start=start, warmup=warmup))


def test_a_weight_rises_from_its_start_over_its_warmup():
    weights = [float(ramp(section(2.0, 10, 4), step)) for step in (0, 9, 10, 11, 13, 14, 500)]
    assert weights == [0, 0, 0, 0.5, 1.5, 2, 2]
    assert [float(ramp(section(2.0, 3), s)) for s in (2, 3, 4)] == [0, 2, 2]
    assert float(ramp(section(2.0), 0)) == 2


def test_nothing_is_computed_before_the_start():
    ran = []

    def function(x):
        jax.debug.callback(lambda: ran.append(1))
        return {"value": x.sum() + 1}

    run = jax.jit(lambda step, x: from_start(section(1.0, 5), step, function, x))
    assert float(run(4, jnp.ones(3))["value"]) == 0
    jax.effects_barrier()
    assert not ran
    assert float(run(5, jnp.ones(3))["value"]) == 4
    jax.effects_barrier()
    assert ran == [1]


W = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4, 4, 3)), jnp.float32)
LOSSES = {
    "square": lambda x: jnp.square(x).mean(),
    "line": lambda x: (x * W).mean(),
    "fourth": lambda x: jnp.mean(x**4),
}


def decode(p):
    return jnp.sin(p) * 2


@pytest.mark.parametrize("step", [0, 3, 6, 100])
def test_several_losses_are_their_weighted_sum_in_value_and_gradient(step):
    sections = {
        "square": section(0.7), "line": section(2.0, 3), "fourth": section(0.5, 4, 4)
    }  # fmt: skip
    terms = {name: Term(sections[name], LOSSES[name]) for name in LOSSES}
    rises = {"square": 1, "line": float(step >= 3), "fourth": min(max((step - 4) / 4, 0), 1)}

    def plain(p):
        x = decode(p)
        return sum(sections[n].weight * rises[n] * LOSSES[n](x) for n in LOSSES)

    p = W * 0.3
    (value, metrics), grad = jax.value_and_grad(
        lambda p: weigh(decode(p), terms, jnp.int32(step)), has_aux=True
    )(p)
    wanted, wanted_grad = jax.value_and_grad(plain)(p)
    assert float(value) == pytest.approx(float(wanted), rel=1e-5)
    np.testing.assert_allclose(grad, wanted_grad, rtol=1e-5, atol=1e-8)
    for name in LOSSES:
        pull = sections[name].weight * rises[name] * jax.grad(LOSSES[name])(decode(p))
        assert float(metrics[f"pull_{name}"]) == pytest.approx(
            float(jnp.linalg.norm(pull.reshape(-1))), rel=1e-5, abs=1e-12
        )


def test_a_balanced_loss_pulls_as_its_weight_says_whatever_its_scale():
    for scale in (1e-3, 1.0, 1e3):
        terms = {
            "judge": Term(section(0.5), lambda x, s=scale: s * LOSSES["line"](x), balanced=True),
            "square": Term(section(0.7), LOSSES["square"]),
            "fourth": Term(section(0.5), LOSSES["fourth"]),
        }
        grad = jax.grad(lambda x, terms=terms: weigh(x, terms, 0)[0])(W)
        others = jax.grad(lambda x: 0.7 * LOSSES["square"](x) + 0.5 * LOSSES["fourth"](x))(W)
        added = grad - others
        norm = jnp.linalg.norm
        assert float(norm(added.ravel())) == pytest.approx(
            0.5 * float(norm(others.ravel())), rel=1e-3
        )
        direction = jax.grad(LOSSES["line"])(W)
        np.testing.assert_allclose(
            added / norm(added.ravel()), direction / norm(direction.ravel()), atol=1e-4
        )
