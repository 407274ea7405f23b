"""The published training steps, at full size and on 8 devices, for chips that are not here."""

import importlib

import pytest

from instella_jax.planning import plan
from instella_jax.runtime import sharding


@pytest.mark.slow
@pytest.mark.parametrize(
    "variant", [pytest.param("instella_512", marks=pytest.mark.thorough), "instella_1024"]
)
@pytest.mark.parametrize("stage", ["tokenizer", "t2i_diffusion", "t2i_ar"])
def test_full_size_steps_lower_for_every_platform(stage, variant):
    config = importlib.import_module(f"configs.{stage}").get_config(variant)
    mesh = sharding.make_mesh(config.mesh)
    step, arguments = plan.abstract_step(config, mesh)
    assert plan.parameter_count(arguments[0].params) > 300e6
    with sharding.use(mesh):
        traced = step.trace(*arguments)
        for platform in ("tpu", "cuda", "rocm"):
            text = traced.lower(lowering_platforms=(platform,)).as_text()
            # Every device takes its part of the batch.
            assert "mhlo.num_partitions = 8" in text
            assert f"{config.train.batch_size}x" in text
