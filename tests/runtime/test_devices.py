"""A backend of jax that does not start is one sentence, whichever command asked for it."""

import os

import jax
import pytest

from instella_jax import cli
from instella_jax.errors import UserError
from instella_jax.runtime import compile_cache, devices

HINT = "instella-jax doctor tells more"
NOT_KNOWN = RuntimeError(
    "Unable to initialize backend 'rocm': Backend 'rocm' is not in the list of known backends: "
    "['cpu']. (set JAX_PLATFORMS='' to automatically choose an available backend)"
)


@pytest.fixture
def broken(monkeypatch):
    """Makes jax fail as it does in a new process."""

    def set_up(error, platforms):
        def fail():
            raise error

        monkeypatch.setattr(jax, "devices", fail)
        monkeypatch.setattr(compile_cache, "use_cache", lambda: None)
        monkeypatch.setattr(devices, "use_cache", lambda: None)
        monkeypatch.setenv("JAX_PLATFORMS", platforms)

    return set_up


@pytest.mark.parametrize(
    ("error", "platforms", "sentence"),
    [
        (
            AssertionError(),
            "cuda",
            "JAX_PLATFORMS=cuda, but jax starts no such backend here: pip install "
            f"'instella-jax[cuda]', or unset it; {HINT}",
        ),
        (
            NOT_KNOWN,
            "rocm,cpu",
            "JAX_PLATFORMS=rocm,cpu, but jax starts no such backend here (Unable to initialize "
            "backend 'rocm': Backend 'rocm' is not in the list of known backends: ['cpu']): pip "
            f"install 'instella-jax[rocm]', or unset it; {HINT}",
        ),
        (
            RuntimeError("no\nabacus"),
            "abacus",
            "JAX_PLATFORMS=abacus, but jax starts no such backend here (no abacus): unset it; "
            f"{HINT}",
        ),
        (RuntimeError("no"), "", f"jax finds nothing to compute with (no); {HINT}"),
    ],
)
def test_why_jax_does_not_start(broken, error, platforms, sentence):
    broken(error, platforms)
    with pytest.raises(UserError) as raised:
        devices.find_devices()
    assert str(raised.value) == sentence


def test_each_command_says_so(broken, monkeypatch, tiny_tokenizer_config, tmp_path):
    broken(AssertionError(), "cuda")
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
    with pytest.raises(UserError, match="JAX_PLATFORMS=cuda"):
        devices.start(tiny_tokenizer_config)
    with pytest.raises(UserError, match="JAX_PLATFORMS=cuda"):
        cli.run(["data", "encode", "demo", str(tmp_path), str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("mesh", "threads"),
    [
        (dict(data=2, fsdp=2, tensor=2), "512"),
        (dict(data=1, fsdp=4, tensor=1), "256"),
        (dict(data=8, fsdp=1, tensor=1), None),
        (dict(data=1, fsdp=1, tensor=1), None),
    ],
)
def test_divided_parameters_get_threads_enough(monkeypatch, tiny_tokenizer_config, mesh, threads):
    monkeypatch.setenv("NPROC", "1")  # To be put back as it was.
    monkeypatch.delenv("NPROC")
    monkeypatch.setattr(devices, "use_cache", lambda: None)
    monkeypatch.setattr(jax.config, "update", lambda name, value: None)
    tiny_tokenizer_config.mesh.update(mesh)
    devices.start(tiny_tokenizer_config)
    assert os.environ.get("NPROC") == threads


def test_threads_that_the_user_chose_stay(monkeypatch, tiny_tokenizer_config):
    monkeypatch.setenv("NPROC", "9")
    monkeypatch.setattr(devices, "use_cache", lambda: None)
    monkeypatch.setattr(jax.config, "update", lambda name, value: None)
    tiny_tokenizer_config.mesh.update(fsdp=8, data=1)
    devices.start(tiny_tokenizer_config)
    assert os.environ["NPROC"] == "9"
