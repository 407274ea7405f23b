"""Eight devices of the CPU, a compile cache and configs that compile in seconds."""

import collections
import os
import re
import signal
import tempfile
from pathlib import Path
from unittest import mock

import jax
import jaxtyping
import pytest

# Shapes and types in the signatures of what computes on arrays are checked at every call. Before
# anything of these modules is imported. Not those of stages/base.py: beartype takes no value for
# one of a protocol without looking for all of its members, of which the toys of tests have some.
# Stages have its signatures, and are checked (tests/stages/test_base.py).
CHECKED = (
    "instella_jax.kernels",
    "instella_jax.losses",
    "instella_jax.models",
    "instella_jax.sampling.album",
    "instella_jax.sampling.load",
    "instella_jax.sampling.generation",
    "instella_jax.sampling.loops",
    "instella_jax.sampling.previews",
    "instella_jax.sampling.prompt_features",
    "instella_jax.sampling.sampler",
    "instella_jax.stages.autoregressive",
    "instella_jax.stages.diffusion",
    "instella_jax.stages.generator",
    "instella_jax.stages.tokenizer",
)
jaxtyping.install_import_hook(CHECKED, "beartype.beartype")

# ruff: noqa: E402
from instella_jax.runtime import devices, sharding
from instella_jax.stages import make_stage
from instella_jax.stages.base import init_stage
from instella_jax.weights import model_folder
from tests import tiny_ar, tiny_diffusion, tiny_tokenizer

DEVICES = 8
# XLA's newer way to compile fusions for a CPU, which this turns off, takes five times as long for a
# training step. The jax of Python 3.12 has no choice.
OLD_FUSIONS = "--xla_cpu_use_fusion_emitters=false"
# Subprocesses that tests start read the same settings from the environment.
CACHE = str(Path(tempfile.gettempdir()) / f"instella-jax-tests-{os.getuid()}")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", CACHE)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
if jax.__version_info__ < (0, 11) and OLD_FUSIONS not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{OLD_FUSIONS} {os.environ.get('XLA_FLAGS', '')}".strip()


def on_the_chip(config):
    """Return whether tests are for the accelerator that is here: `pytest -m accelerator`."""
    return re.search(r"(?<!not )\baccelerator\b", config.option.markexpr) is not None


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """A chip is for one process."""
    if on_the_chip(config):
        config.option.numprocesses = 0


def pytest_configure(config):
    """Start jax, on eight devices of the CPU unless the chip is asked for."""
    # A shell's background jobs ignore Ctrl-C, and so would the processes that tests start.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # jax has read the environment by now.
    jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
    jax.config.update(
        "jax_persistent_cache_min_compile_time_secs",
        float(os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"]),
    )
    # A cache entry that another process is writing, or was killed while writing, is no fault.
    Path(os.environ["JAX_COMPILATION_CACHE_DIR"]).mkdir(parents=True, exist_ok=True, mode=0o700)
    config.addinivalue_line("filterwarnings", "ignore:Error (reading|writing) persistent")
    if on_the_chip(config):
        named = jax.config.jax_platforms
        if named and "cpu" not in named:  # what the chip is compared with
            jax.config.update("jax_platforms", f"{named},cpu")
        return
    os.environ["JAX_PLATFORMS"] = "cpu"
    jax.config.update("jax_platforms", "cpu")
    # What takes long here is compiling, not what comes of it.
    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    jax.config.update(
        "jax_disable_most_optimizations", os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] == "1"
    )
    jax.config.update("jax_num_cpu_devices", DEVICES)
    # For this process alone, as jax begins here.
    with mock.patch.dict(os.environ, NPROC=str(devices.THREADS_PER_DEVICE * DEVICES)):
        jax.devices()


@pytest.hookimpl(tryfirst=True)  # before `-m` takes its choice
def pytest_collection_modifyitems(config, items):
    """Begins with the files that take longest, so that no worker is left with one at the end."""
    for item in items:
        if item.get_closest_marker("thorough"):
            item.add_marker(pytest.mark.slow)
    if on_the_chip(config) and jax.default_backend() == "cpu":
        for item in items:
            item.add_marker(pytest.mark.skip(reason="jax finds no accelerator here"))
    slow = collections.Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])


@pytest.fixture
def tiny_tokenizer_config():
    """Config of a tiny tokenizer stage."""
    return tiny_tokenizer.get_config().lock()


@pytest.fixture(scope="session")
def tiny_tokenizer_folder(tmp_path_factory):
    """Model folder of a tiny tokenizer with random weights."""
    stage = make_stage(tiny_tokenizer.get_config())
    params = jax.jit(lambda key: sharding.values(init_stage(stage, key)))(jax.random.key(0))
    folder = tmp_path_factory.mktemp("tokenizer")
    model_folder.save(folder, stage.describe(), params)
    return folder


@pytest.fixture
def tiny_diffusion_config(tiny_tokenizer_folder):
    """Config of a tiny diffusion stage on a tiny tokenizer."""
    config = tiny_diffusion.get_config()
    config.tokenizer = str(tiny_tokenizer_folder)
    return config.lock()


@pytest.fixture
def tiny_ar_config(tiny_tokenizer_folder):
    """Config of a tiny autoregressive stage on a tiny tokenizer."""
    config = tiny_ar.get_config()
    config.tokenizer = str(tiny_tokenizer_folder)
    return config.lock()
