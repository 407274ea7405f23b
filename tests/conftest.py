"""Eight devices, a compile cache and configs small enough to compile in seconds."""

import getpass
import os
import tempfile
from pathlib import Path

import jax
import pytest

import configs.t2i_ar
import configs.t2i_diffusion
import configs.tokenizer
from instella_jax import model_folder, sharding
from instella_jax.stages import init_stage, make_stage

DEVICES = 8

# Subprocesses that tests start read the same settings from the environment.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR",
    str(Path(tempfile.gettempdir()) / f"instella-jax-tests-{getpass.getuser()}"),
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
# jax has read the environment by now.
jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
jax.config.update(
    "jax_persistent_cache_min_compile_time_secs",
    float(os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"]),
)
jax.config.update("jax_num_cpu_devices", DEVICES)


def pytest_configure(config):
    """A cache entry that another process is writing, or was killed while writing, is no fault."""
    Path(os.environ["JAX_COMPILATION_CACHE_DIR"]).mkdir(parents=True, exist_ok=True, mode=0o700)
    config.addinivalue_line("filterwarnings", "ignore:Error (reading|writing) persistent")


@pytest.fixture
def quick_compile():
    """Compiles in half the time, to slower programs."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def shrink(config):
    """Makes any stage small: 32x32 scenes, eight steps of eight pictures, no pictures drawn."""
    config.mesh.update(data=1, fsdp=1, tensor=1)
    config.data.image_size = 32
    config.data.scenes.max_objects = 1
    config.run.unroll = False
    config.optimizer.update(warmup_steps=2, schedule="constant", eps=1e-4)
    config.train.update(
        steps=8, batch_size=8, steps_per_call=1, log_every=1, eval_every=0, save_every=4,
        image_every=0, keep=2, ema_decay=0.9,
    )  # fmt: skip
    config.eval.update(batch_size=8, batches=1, pictures=0)
    return config


def make_tokenizer_config():
    """A tokenizer of some 10,000 parameters, 4 tokens of 8 bits."""
    config = shrink(configs.tokenizer.get_config())
    config.model.update(
        num_tokens=4, bits=8, encoder_layers=1, encoder_heads=2, encoder_head_dim=8,
        decoder_layers=1, decoder_heads=2, decoder_head_dim=8, rope_axes=(4, 2, 2), scale=32,
    )  # fmt: skip
    return config.lock()


@pytest.fixture
def tiny_tokenizer_config():
    """Config of a tiny tokenizer stage."""
    return make_tokenizer_config()


@pytest.fixture(scope="session")
def tiny_tokenizer_folder(tmp_path_factory):
    """Model folder of a tiny tokenizer with random weights."""
    stage = make_stage(make_tokenizer_config())
    params = jax.jit(lambda key: sharding.values(init_stage(stage, key)))(jax.random.key(0))
    folder = tmp_path_factory.mktemp("tokenizer")
    model_folder.save(folder, stage.describe(), params)
    return folder


def make_generator_config(config, tokenizer_folder):
    """A generator of two blocks on a tiny tokenizer."""
    config = shrink(config)
    config.tokenizer = str(tokenizer_folder)
    config.model.update(num_layers=2, num_heads=2, head_dim=8, num_tokens=4, bits=8)
    config.text.model.update(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2,
    )  # fmt: skip
    return config.lock()


@pytest.fixture
def tiny_diffusion_config(tiny_tokenizer_folder):
    """Config of a tiny diffusion stage on a tiny tokenizer."""
    return make_generator_config(configs.t2i_diffusion.get_config(), tiny_tokenizer_folder)


@pytest.fixture
def tiny_ar_config(tiny_tokenizer_folder):
    """Config of a tiny autoregressive stage on a tiny tokenizer."""
    return make_generator_config(configs.t2i_ar.get_config(), tiny_tokenizer_folder)
