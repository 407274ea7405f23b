"""Previews: held-out images, each beside its reconstruction and their difference."""

import jax
import numpy as np

from instella_jax.runtime import sharding
from instella_jax.sampling.previews import preview
from instella_jax.stages import make_stage
from instella_jax.stages.base import init_stage


def test_each_original_is_followed_by_its_reconstruction_in_its_row(tiny_tokenizer_config):
    stage = make_stage(tiny_tokenizer_config)
    params = sharding.values(jax.jit(lambda key: init_stage(stage, key))(jax.random.key(0)))
    shown = preview(stage, params, {}, 3)
    originals = next(stage.loader("heldout", batch_size=3))["image"]
    np.testing.assert_array_equal(shown.images[::3], originals)
    assert shown.captions[::3] == ["original"] * 3 and shown.together == 3
    for original, copy, caption in zip(
        originals, shown.images[1::3], shown.captions[1::3], strict=True
    ):
        error = np.mean((original.astype(float) - copy) ** 2)
        # Measured before rounding to grey levels.
        assert abs(float(caption.removesuffix(" dB")) - 10 * np.log10(255**2 / error)) < 0.1
    apart = shown.images[1::3].astype(float) - originals
    np.testing.assert_allclose(2 * (shown.images[2::3] - 127.5), apart, atol=1)
