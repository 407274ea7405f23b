"""Distances of pixels against numpy."""

import jax.numpy as jnp
import numpy as np
import pytest

from instella_jax.config_keys import KEYS
from instella_jax.losses.pixel import KINDS, pixel_loss


def test_each_kind_is_its_formula():
    rng = np.random.default_rng(0)
    a, b = rng.uniform(-1.5, 1.5, (2, 3, 8, 8, 3)).astype(np.float32)
    d = np.abs(a - b)
    wanted = {
        "smooth_l1": np.where(d < 1, d**2 / 2, d - 0.5).mean(),
        "l1": d.mean(),
        "l2": (d**2).mean(),
    }
    assert tuple(wanted) == KINDS == KEYS["loss.pixel.kind"].choices
    for kind, value in wanted.items():
        assert float(pixel_loss(kind, jnp.asarray(a), jnp.asarray(b))) == pytest.approx(
            value, rel=1e-5
        )
