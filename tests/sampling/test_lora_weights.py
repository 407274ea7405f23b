"""Adapters in the pipeline: applied, merged, taken away, saved."""

import jax
import numpy as np
import pytest

from instella_jax import InstellaPipeline
from instella_jax.models.functional import init_params
from instella_jax.runtime import sharding
from instella_jax.weights import lora_files

PROMPT = "a cat on a red background"


@pytest.fixture(scope="module")
def pipe():
    return InstellaPipeline.from_pretrained("demo_ar")


@pytest.fixture(scope="module")
def adapters(pipe, tmp_path_factory):
    """A folder of random adapters."""
    network = pipe.sampler.generator
    made = lora_files.make_adapters(network, 2, 2.0, ("q_proj", "net.2"), "float32")
    rng = np.random.default_rng(0)
    like = sharding.values(jax.eval_shape(lambda key: init_params(made, key), jax.random.key(0)))
    params = jax.tree.map(lambda x: 0.2 * rng.normal(size=x.shape).astype(np.float32), like)
    folder = tmp_path_factory.mktemp("adapters")
    lora_files.save(folder, network, made, params, base="demo_ar", step=1)
    return folder


def sample(pipe):
    return pipe(PROMPT, num_images_per_prompt=2, output_type="codes").codes


@pytest.mark.slow
def test_adapters_change_what_is_sampled_until_they_are_taken_away(pipe, adapters, tmp_path):
    plain, weights = sample(pipe), pipe.weights
    pipe.load_lora_weights(adapters, scale=0.0)
    np.testing.assert_array_equal(sample(pipe), plain)
    pipe.unload_lora_weights()
    assert pipe.weights is weights
    pipe.load_lora_weights(adapters)
    applied = sample(pipe)
    assert (applied != plain).mean() > 0.05
    assert set(pipe.weights.paths) - set(weights.paths) == {"lora 1 x 1"}
    pipe.save_pretrained(tmp_path / "saved")
    pipe.unload_lora_weights()
    np.testing.assert_array_equal(sample(pipe), plain)
    pipe.load_lora_weights(adapters, merge=True)
    merged = sample(pipe)
    # A logit within rounding of the random number may give another bit.
    assert (merged != applied).mean() < 0.01
    pipe.unload_lora_weights()
    saved = InstellaPipeline.from_pretrained(tmp_path / "saved")
    np.testing.assert_array_equal(sample(saved), merged)


def test_what_is_no_adapter_is_a_value_error(pipe, tmp_path):
    with pytest.raises(ValueError, match="no adapters at"):
        pipe.load_lora_weights(tmp_path)
    with pytest.raises(ValueError, match="scale is 'much': expected a number"):
        pipe.load_lora_weights(tmp_path, scale="much")
