import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import sampling as benchmark
from benchmarks import train
from configs import t2i_diffusion
from instella_jax import sampling
from instella_jax.errors import UserError

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.usefixtures("quick_compile")
def test_the_sampler_that_recomputes_the_text_draws_the_same():
    size = dict(num_layers=2, num_heads=2, head_dim=4, bits=5, text_width=6)
    text, mask = benchmark.prompts(size, 2, 3)
    assert text.shape == (2, 4, 3, 6) and mask.sum(1).tolist() == [3, 3, 0, 0]
    network = benchmark.DiffusionTransformer(num_tokens=4, **size)
    params = jax.tree.map(
        lambda x: x + 0.3 * jax.random.normal(jax.random.key(x.size), x.shape),
        benchmark.random_params(network),
    )
    keys = sampling.image_keys(jnp.arange(2))
    once, again = (
        np.asarray(sampling.sample_diffusion(n, params, text, mask, keys, steps=3))
        for n in (network, benchmark.Recomputing(num_tokens=4, **size))
    )
    np.testing.assert_array_equal(once, again)


def test_one_key_at_a_time_is_varied():
    config = t2i_diffusion.get_config()
    rows = [name for name, _ in train.variations(config, ["unroll", "remat", "attention"])]
    assert rows == [
        "", "run.unroll=False", "run.remat=dots", "run.remat=full", "run.attention=xla",
        "run.attention=cudnn",
    ]  # fmt: skip
    with pytest.raises(UserError, match="--vary has 'rope': expected some of"):
        train.variations(config, ["rope"])


@pytest.mark.slow
def test_the_step_is_timed_without_any_file():
    command = [sys.executable, "-m", "benchmarks.train", "--config=tests/tiny_diffusion.py"]
    options = ["--config.tokenizer=", "--config.text.encoder=", "--config.data.kind=codes"]
    size = ["--config.run.cpu_devices=1", "--steps=3", "--synthetic", "--one"]
    done = subprocess.run(
        [*command, *options, *size], capture_output=True, text=True, check=True, cwd=ROOT
    )
    result = json.loads(done.stdout.splitlines()[-1])
    assert 0 < result["least"] <= result["median"] <= result["most"]
    assert result["images_per_second"] == pytest.approx(8 / result["median"])
    assert result["tokens_per_second"] == pytest.approx(4 * 8 / result["median"])
    assert result["compile_seconds"] > 0 and result["peak_memory"] > 1e8
