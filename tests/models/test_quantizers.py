"""Ways to make bits: the same bits at evaluation, each its own gradient; codes that are cut."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from instella_jax.config_keys import KEYS
from instella_jax.models.quantizers import (
    QUANTIZERS,
    drop_tail,
    hard_code,
    keep_tokens,
    quantize,
    sample_code,
)

KEY = jax.random.key(0)
LOGITS = np.random.default_rng(0).normal(size=(5, 3, 8)).astype(np.float32) * 2
W = np.random.default_rng(1).normal(size=LOGITS.shape).astype(np.float32)


def soft(kind, x):
    """What bits were rounded from, by numpy in float64; 1/2 is where a bit turns."""
    x = x.astype(np.float64)
    if kind == "bernoulli":
        return 1 / (1 + np.exp(-x))
    if kind == "bsq":
        x = x / np.linalg.norm(x, axis=-1, keepdims=True) * np.sqrt(x.shape[-1])
    return ((np.tanh(x) if kind == "fsq" else x) + 1) / 2


@pytest.mark.parametrize("kind", QUANTIZERS)
def test_bits_are_0_and_1_with_the_gradient_of_what_they_were_rounded_from(kind):
    code = np.asarray(quantize(kind, jnp.asarray(LOGITS), KEY, 1.0))
    np.testing.assert_allclose(code, np.round(code), atol=1e-6)
    wanted = sample_code(jnp.asarray(LOGITS), KEY, 1.0)
    if kind != "bernoulli":
        wanted = hard_code(jnp.asarray(LOGITS))
        np.testing.assert_array_equal(wanted, soft(kind, LOGITS) > 0.5)
    np.testing.assert_array_equal(np.round(code), np.round(wanted))
    grad = jax.grad(lambda x: (quantize(kind, x, KEY, 1.0) * W).sum())(jnp.asarray(LOGITS))
    step = 1e-6
    for place in [(0, 0, 0), (2, 1, 5), (4, 2, 7)]:
        ends = []
        for sign in (1, -1):
            moved = LOGITS.astype(np.float64)
            moved[place] += sign * step
            ends.append((soft(kind, moved) * W).sum())
        assert float(grad[place]) == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-3)


def test_the_config_knows_them():
    assert KEYS["loss.quantizer"].choices == QUANTIZERS


def test_the_first_tokens_are_kept():
    code = jnp.ones((3, 4, 2))
    kept = np.asarray(keep_tokens(code, jnp.array([1.0, 2.0, 4.0])))
    assert kept.any(-1).sum(1).tolist() == [1, 2, 4] and kept[0, 0].all()
    assert np.asarray(keep_tokens(code, 3)).any(-1).sum(1).tolist() == [3, 3, 3]


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_tails_are_dropped_as_often_as_asked_and_uniformly(share):
    code = jnp.ones((8_000, 4, 2))
    left = np.asarray(drop_tail(code, KEY, share)).any(-1).sum(1)
    counts = np.bincount(left, minlength=5) / len(left)
    # Cut after 1, 2, 3 or 4 tokens alike, the last of which cuts nothing.
    wanted = [0, share / 4, share / 4, share / 4, 1 - 3 * share / 4]
    np.testing.assert_allclose(counts, wanted, atol=0.02)
