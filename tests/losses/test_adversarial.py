"""The two players' losses against numpy, who learns from what, and what the discriminator sees."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from instella_jax.losses.adversarial import (
    PACE,
    augmented,
    discriminator_optimizer,
    fooling_loss,
    judging_loss,
)
from instella_jax.models.discriminator import Discriminator, blur_halve
from instella_jax.models.functional import apply, init_params
from instella_jax.runtime import sharding

KEY = jax.random.key(3)
JUDGE = Discriminator(width=4, halvings=2)
judge = functools.partial(apply, JUDGE)
REAL, FAKE = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (2, 3, 16, 24, 3)), jnp.float32)


@pytest.fixture(scope="module")
def params():
    made = sharding.values(init_params(JUDGE, KEY))
    return {**made, "answers": jnp.array([0.6, -0.4])}


def test_hinge_and_lecam_are_those_of_numpy(params):
    loss, metrics = judging_loss(judge, params, REAL, FAKE, KEY, False, 0.3)
    real, fake = (np.asarray(apply(JUDGE, params, x)) for x in (REAL, FAKE))
    assert real.shape == (3, 4, 6)
    hinge = np.maximum(0, 1 - real).mean() + np.maximum(0, 1 + fake).mean()
    lecam = (np.maximum(0, real + 0.4) ** 2).mean() + (np.maximum(0, 0.6 - fake) ** 2).mean()
    assert float(metrics["discriminator"]) == pytest.approx(hinge, rel=1e-5)
    assert float(metrics["lecam"]) == pytest.approx(lecam, rel=1e-5)
    assert float(loss) == pytest.approx(hinge + 0.3 * lecam, rel=1e-5)
    assert float(fooling_loss(judge, params, FAKE, KEY, False)) == pytest.approx(-fake.mean())


def test_neither_player_learns_for_the_other(params):
    def judging(params, fake):
        return judging_loss(judge, params, REAL, fake, KEY, False, 0.3)[0]

    def fooling(params, fake):
        return fooling_loss(judge, params, fake, KEY, False)

    def size(tree):
        return sum(float(jnp.abs(x).sum()) for x in jax.tree.leaves(tree))

    own, to_fake = jax.grad(judging, (0, 1))(params, FAKE)
    assert size(own) > 0 and size(to_fake) == 0
    own, to_fake = jax.grad(fooling, (0, 1))(params, FAKE)
    assert size(own) == 0 and size(to_fake) > 0


def test_its_optimizer_moves_the_running_means_towards_the_answers(params):
    optimizer = discriminator_optimizer(ConfigDict(dict(learning_rate=1e-3, b1=0.5, b2=0.9)))
    gradient, metrics = jax.grad(
        lambda p: judging_loss(judge, p, REAL, FAKE, KEY, False, 0.3), has_aux=True
    )(params)
    updates, _ = optimizer.update(gradient, optimizer.init(params), params)
    now = np.array([metrics["answers_real"], metrics["answers_fake"]])
    moved = np.array([0.6, -0.4]) * (1 - PACE) + PACE * now
    np.testing.assert_allclose(params["answers"] + updates["answers"], moved, rtol=1e-5)
    # The first step of Adam is its rate, wherever there is a gradient.
    kernel = gradient["conv_in"]["kernel"]
    np.testing.assert_allclose(
        updates["conv_in"]["kernel"], -1e-3 * np.sign(kernel), rtol=1e-2, atol=1e-6
    )


def test_the_blur_is_a_convolution():
    x = np.random.default_rng(1).normal(size=(1, 5, 8, 2)).astype(np.float32)
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    kernel = np.outer([1, 2, 1], [1, 2, 1]) / 16
    wanted = np.zeros((1, 3, 4, 2))
    for i in range(3):
        for j in range(4):
            cell = padded[:, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3]
            wanted[:, i, j] = np.einsum("bhwc,hw->bc", cell, kernel)
    np.testing.assert_allclose(blur_halve(jnp.asarray(x)), wanted, atol=1e-6)


def test_each_picture_is_changed_in_its_own_way_and_gradients_pass():
    images = jnp.broadcast_to(REAL[:1], (8, *REAL.shape[1:]))
    changed = np.asarray(augmented(images, KEY))
    assert changed.shape == images.shape and np.isfinite(changed).all()
    assert len({x.tobytes() for x in changed}) == 8
    np.testing.assert_array_equal(changed, augmented(images, KEY))
    # Up to a half is cut out and an eighth shifted out; what is left reaches the picture.
    holes = (changed == 0).all(-1).mean((1, 2))
    assert (holes > 0.05).all() and (holes < 0.5).all()
    gradient = jax.grad(lambda x: jnp.square(augmented(x, KEY)).sum())(images)
    assert (np.abs(gradient).sum((1, 2, 3)) > 0).all()


def test_brightness_saturation_and_contrast_are_changed():
    """What is neither cut out nor shifted out, of pictures that show one change each."""
    grey = jnp.full((64, 16, 16, 3), 0.25)
    left = np.asarray(augmented(grey, KEY))
    shades = np.array([x[np.abs(x).sum(-1) > 0][0] for x in left])
    # Without colour and without contrast only brightness acts: up to a half, either way.
    np.testing.assert_allclose(shades, shades[:, :1].repeat(3, 1), atol=1e-6)
    moved = shades[:, 0] - 0.25
    assert moved.min() < -0.4 and moved.max() > 0.4 and np.abs(moved).max() <= 0.5
    coloured = grey + jnp.array([0.3, 0.0, -0.3])
    left = np.asarray(augmented(coloured, KEY))
    spread = np.array([np.ptp(x[np.abs(x).sum(-1) > 0][0]) for x in left]) / 0.6
    # The mean of a picture takes its colours with it: saturation and contrast multiply.
    assert spread.min() < 0.3 and spread.max() > 1.7 and spread.max() <= 3
    edge = grey.at[:, 8:].set(0.75)
    left = np.asarray(augmented(edge, KEY))
    steps = np.array([np.ptp(np.unique(np.round(x[np.abs(x).sum(-1) > 0], 4))) for x in left]) / 0.5
    both = steps[steps > 0.1]  # a hole may leave one half alone
    assert len(both) > 40 and both.min() < 0.65 and both.max() > 1.35 and both.max() <= 1.5 + 1e-3


def test_what_a_shift_leaves_is_in_the_middle_of_the_range():
    """Rows and columns that come back in on the other side are no part of a picture."""
    ramp = jnp.broadcast_to(jnp.arange(16.0)[:, None, None] + 100, (16, 16, 3))
    left = np.asarray(augmented(jnp.broadcast_to(ramp, (32, 16, 16, 3)), KEY))
    for x in left:
        for column in range(16):
            rows = x[:, column, 0][x[:, column, 0] != 0]
            assert (np.diff(rows) > 0).all()  # nothing has wrapped around
