"""Terms of the bits against numpy, and what their gradients do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from instella_jax.losses.code_terms import balance_loss, code_health, entropy_loss


def entropy(p):
    return -(p * np.log2(p) + (1 - p) * np.log2(1 - p))


def test_entropy_and_balance_are_those_of_numpy():
    logits = np.random.default_rng(0).normal(size=(6, 4, 8)) * 2
    p = 1 / (1 + np.exp(-logits))
    x = jnp.asarray(logits, jnp.float32)
    assert float(entropy_loss(x)) == pytest.approx(entropy(p).mean(), rel=1e-5)
    assert float(balance_loss(x)) == pytest.approx(1 - entropy(p.mean(0)).mean(), rel=1e-4)


def test_their_gradients_make_bits_certain_and_even():
    logits = jnp.full((4, 2, 3), 0.5)
    assert (jax.grad(entropy_loss)(logits) < 0).all()  # descent moves them away from 0
    assert (jax.grad(balance_loss)(logits) > 0).all()  # and a bit that is on too often towards it
    for loss in (entropy_loss, balance_loss):  # however large they are
        value, grad = jax.value_and_grad(loss)(jnp.array([[[1e4, -1e4]]]))
        assert np.isfinite(value) and np.isfinite(grad).all()


def test_health_is_counted():
    code = np.zeros((4, 2, 2), np.float32)
    code[:, 0, 0] = 1  # on in all
    code[:2, 1, 1] = 1  # on in half
    code[0, 1, 0] = 1  # on in a quarter; the last bit is never on
    health = {k: float(v) for k, v in code_health(jnp.asarray(code)).items()}
    assert health["bits_on"] == pytest.approx((4 + 2 + 1) / 16)
    assert health["dead_bits"] == pytest.approx(2 / 4)
    assert health["bits_entropy"] == pytest.approx((1 + entropy(0.25)) / 4, rel=1e-5)
    # From each picture to the next and from the last to the first: 1, 1, 0 and 2 bits of four.
    assert health["pictures_differ"] == pytest.approx(4 / 16)
    # Tokens: 10 and 11, 10 and 01, 10 and 00 twice.
    assert health["tokens_differ"] == pytest.approx((1 + 2 + 1 + 1) / 8)
