import itertools
from statistics import NormalDist
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from instella_jax.errors import UserError
from instella_jax.models import binary_diffusion as bd

SHAPE = (1, 1, 1)


def bit(value):
    return jnp.full(SHAPE, float(value))


def flip_logit(p):
    """The flip logit whose sigmoid is p."""
    return jnp.full(SHAPE, np.log(p / (1 - p)), jnp.float32)


@pytest.mark.parametrize("t", [0.0, 0.25, 1.0])
def test_noise_flips_half_of_t(t):
    bits = jnp.tile(jnp.array([0.0, 1.0]), (4, 1000, 25))
    uniforms = jax.random.uniform(jax.random.key(0), bits.shape)
    z = bd.add_noise(bits, jnp.full(4, t), uniforms)
    assert set(np.unique(z)) <= {0.0, 1.0}
    for value in (0.0, 1.0):
        flipped = np.asarray(z != bits)[np.asarray(bits) == value].mean()
        # 100,000 draws: four standard deviations.
        assert abs(flipped - t / 2) <= 4 * np.sqrt(t / 2 * (1 - t / 2) / 1e5)


def test_each_image_has_its_own_time():
    bits = jnp.ones((2, 3, 4))
    z = bd.add_noise(bits, jnp.array([0.0, 1.0]), jnp.full(bits.shape, 0.75))
    assert (z[0] == 1).all() and (z[1] == 0).all()


def test_flip_and_clean_logits_agree_on_the_clean_bit():
    z = jnp.array([0.0, 1.0])[:, None, None]
    output = jnp.array([2.0, 2.0])[:, None, None]
    np.testing.assert_array_equal(bd.clean_logits(output, z).ravel(), [2.0, -2.0])
    np.testing.assert_array_equal(bd.clean_logits(output, z, "x").ravel(), [2.0, 2.0])
    for target in get_args(bd.Target):
        flip = jax.nn.sigmoid(bd.flip_logits(output, z, target))
        clean = z * (1 - flip) + (1 - z) * flip
        expected = jax.nn.sigmoid(bd.clean_logits(output, z, target))
        np.testing.assert_allclose(clean, expected, rtol=1e-6)


def test_loss_and_accuracy_by_hand():
    logits, bits = jnp.array([[[0.0, 3.0, -1.0]]]), jnp.array([[[1.0, 1.0, 1.0]]])
    by_hand = np.mean([np.log(2), np.log(1 + np.exp(-3)), np.log(1 + np.exp(1))])
    np.testing.assert_allclose(bd.loss(logits, bits), by_hand, rtol=1e-6)
    np.testing.assert_allclose(bd.bit_accuracy(logits, bits), 1 / 3, rtol=1e-6)
    assert np.isfinite(bd.loss(jnp.full((1, 1, 1), 1e4), jnp.zeros((1, 1, 1))))


def test_schedule_runs_from_one_to_zero():
    times = [float(bd.time_of_step(i, 4, 2.0)) for i in range(5)]
    np.testing.assert_allclose(times, [1, 0.5625, 0.25, 0.0625, 0])


def test_times_follow_their_distribution():
    logits = np.log(1 / np.asarray(bd.sample_times(jax.random.key(1), 20_000)) - 1)
    assert abs(logits.mean()) < 0.03 and abs(logits.std() - 1) < 0.03
    uniform = np.sort(bd.sample_times(jax.random.key(1), 20_000, "uniform"))
    assert np.abs(uniform - np.linspace(0, 1, 20_000)).max() < 0.02
    for kind in bd.TIME_DISTRIBUTIONS:
        drawn = np.sort(bd.sample_times(jax.random.key(2), 20_000, kind))
        spread = bd.spread_times(20_000, kind)
        assert np.isfinite(spread).all() and np.abs(drawn - spread).max() < 0.03


def test_a_shift_adds_its_logarithm_to_the_logit_of_a_time():
    quantiles = np.float64(jax.random.uniform(jax.random.key(3), (1_000,)))
    unshifted = {
        "uniform": np.log(quantiles / (1 - quantiles)),
        "logit_normal": np.array([NormalDist().inv_cdf(q) for q in quantiles]),
    }
    for kind, logits in unshifted.items():
        for shift in (1.0, 3.0):
            times = np.float64(bd.sample_times(jax.random.key(3), 1_000, kind, shift))
            np.testing.assert_allclose(
                np.log(times / (1 - times)), logits + np.log(shift), atol=2e-3
            )


def test_unknown_names_are_refused():
    with pytest.raises(UserError, match="loss.times"):
        bd.sample_times(jax.random.key(0), 1, "cosine")
    with pytest.raises(ValueError, match="protocol"):
        bd.step_probability(bit(0), bit(0), 1.0, 0.5, 3)


def test_guidance_pushes_away_from_the_unconditional():
    conditional, unconditional = jnp.array([1.0]), jnp.array([0.5])
    np.testing.assert_allclose(bd.guided(conditional, unconditional, 0.0, 1.0), 1.0)
    np.testing.assert_allclose(bd.guided(conditional, unconditional, 3.0, 0.5), 5.0)


@pytest.mark.parametrize(("p", "z"), list(itertools.product([0.1, 0.5, 0.9], [0, 1])))
def test_posterior_agrees_with_enumeration(p, z):
    """P(z_t' = 1) over all clean bits and both values of z_t', by Bayes' rule."""
    t, t_next = 0.8, 0.3

    def noisy(value, clean, time):
        return (value == clean) * (1 - time) + time / 2

    clean_one = p if z == 0 else 1 - p
    # The published form carries z_t back by t - t', not by the exact (t - t') / (1 - t').
    back = {v: noisy(v, z, t - t_next) for v in (0, 1)}
    weight = {
        v: back[v] * sum(
            noisy(v, clean, t_next) * (clean_one if clean else 1 - clean_one) for clean in (0, 1)
        )
        for v in (0, 1)
    }  # fmt: skip
    clean, following = bd.step_probability(flip_logit(p), bit(z), t, t_next, 2)
    np.testing.assert_allclose(clean, clean_one, rtol=1e-5)
    np.testing.assert_allclose(following, weight[1] / (weight[0] + weight[1]), rtol=1e-5)
    _, following = bd.step_probability(flip_logit(p), bit(z), t, t_next, 1)
    np.testing.assert_allclose(
        following,
        noisy(1, 1, t_next) * clean_one + noisy(1, 0, t_next) * (1 - clean_one),
        rtol=1e-5,
    )


@pytest.mark.parametrize("protocol", bd.PROTOCOLS)
@pytest.mark.parametrize("size", [1e-4, 1.0, 1e5])
def test_temperature_zero_thresholds_whatever_the_draw(protocol, size):
    z = jnp.array([0.0, 0.0, 1.0, 1.0])
    flip = jnp.array([-size, size, -size, size])
    for uniform, last in itertools.product([0.0, 0.999], [False, True]):
        step = bd.sampling_step(
            flip, 0 * flip, z, 0.5, 0.25, 1.0, 0.0, last, jnp.full(4, uniform), protocol
        )
        np.testing.assert_array_equal(step, [0, 1, 1, 0])


@pytest.mark.parametrize("protocol", bd.PROTOCOLS)
def test_the_last_step_samples_nothing(protocol):
    z, flip = jnp.array([0.0, 0.0, 1.0, 1.0]), jnp.array([-0.1, 0.1, -0.1, 0.1])
    for uniform in (0.0, 0.999):
        step = bd.sampling_step(
            flip, flip, z, 0.1, 0.0, 0.0, 1.0, True, jnp.full(4, uniform), protocol
        )
        np.testing.assert_array_equal(step, [0, 1, 1, 0])
