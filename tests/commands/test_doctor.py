"""The doctor's sentences for machines that are not here, and its visit to this one."""

import dataclasses
import os
import subprocess
import sys

import pytest

from instella_jax.commands import doctor
from instella_jax.runtime import compile_cache

VERSIONS = {"jax": "0.10.2", "jaxlib": "0.10.2"}
HEALTHY = doctor.Facts(
    VERSIONS, frozenset(), "cpu", ("cpu",), attention=("xla",), kernel="xla", step_seconds=0.01
)


def sentences(**changes):
    return list(doctor.diagnose(dataclasses.replace(HEALTHY, **changes)))


def test_a_healthy_machine_has_nothing():
    assert sentences() == []
    gpu = {**VERSIONS, "jax-cuda12-plugin": "0.10.2"}
    hardware = frozenset({"NVIDIA GPU"})
    assert sentences(versions=gpu, backend="gpu", hardware=hardware, step_error=1e-3) == []
    # A patch of jax alone has no jaxlib of its own number.
    assert sentences(versions={"jax": "0.12.0.1", "jaxlib": "0.12.0"}) == []


@pytest.mark.parametrize(
    ("kind", "extra"), [("NVIDIA GPU", "cuda"), ("AMD GPU", "rocm"), ("TPU", "tpu")]
)
def test_an_accelerator_that_jax_does_not_use(kind, extra):
    (missing,) = sentences(hardware=frozenset({kind}))
    assert "computes on the CPU" in missing and f"instella-jax[{extra}]" in missing
    (told,) = sentences(hardware=frozenset({kind}), platforms="cpu")
    assert "JAX_PLATFORMS=cpu" in told
    plugin = doctor.PLUGINS[kind][0]
    versions = {**VERSIONS, plugin: "0.10.2"}
    (driver,) = sentences(hardware=frozenset({kind}), versions=versions)
    assert plugin in driver and "driver" in driver


def test_versions_that_do_not_belong_together():
    (pair,) = sentences(versions={"jax": "0.10.2", "jaxlib": "0.9.1"})
    assert "jax 0.10.2 and jaxlib 0.9.1" in pair
    (plugin,) = sentences(versions={**VERSIONS, "jax-rocm7-plugin": "0.9.0"})
    assert "jax-rocm7-plugin 0.9.0 does not fit jaxlib 0.10.2" in plugin
    both = {**VERSIONS, "jax-rocm7-plugin": "0.10.2", "jax-cuda12-plugin": "0.10.2"}
    (two,) = sentences(versions=both)
    assert "NVIDIA and for AMD" in two


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"backend": "", "error": "no driver"}, "does not start: no driver"),
        ({"error": "out of memory"}, "step failed on the device: out of memory"),
        ({"step_error": 0.5}, "other numbers"),
        ({"step_error": float("nan")}, "other numbers"),
        ({"cache": False}, "INSTELLA_JAX_CACHE"),
        ({"processes": "error: half of it"}, "half of it"),
    ],
)
def test_each_fault_has_a_sentence(changes, words):
    (sentence,) = sentences(**changes)
    assert words in sentence


def visit(**environ):
    """Runs the command in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "instella_jax", "doctor"],
        env={**os.environ, **environ}, capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_memory_is_that_of_the_machine():
    total, available = doctor.find_memory()
    assert total is not None and available is not None
    lines = list(doctor.describe(dataclasses.replace(HEALTHY, host_memory=(total, available))))
    assert f"host memory {total / 1e9:.1f} GB, available {available / 1e9:.1f} GB" in lines
    # Of this process alone, and of any computer that this could run on.
    assert 1e8 < available <= total < 1e14
    lines = list(doctor.describe(dataclasses.replace(HEALTHY, backend="gpu")))
    assert "memory      of each device for jax: unknown" in lines
    assert "host memory unknown, available unknown" in lines


def test_the_cache_folder_is_tried(monkeypatch, tmp_path):
    monkeypatch.setenv("INSTELLA_JAX_CACHE", str(tmp_path / "a" / "b"))
    assert compile_cache.can_keep() and list((tmp_path / "a" / "b").iterdir()) == []
    (tmp_path / "file").touch()
    # In /proc even root, whom permissions do not bind, can make nothing.
    for folder in (tmp_path / "file", tmp_path / "file" / "a", "/proc", "/proc/a"):
        monkeypatch.setenv("INSTELLA_JAX_CACHE", str(folder))
        assert not compile_cache.can_keep()


def test_a_broken_environment_is_told_in_sentences():
    missing = "rocm" if any("cuda" in name for name in doctor.find_versions()) else "cuda"
    run = visit(
        JAX_PLATFORMS=missing, INSTELLA_JAX_CACHE="/proc/a", SLURM_JOB_ID="1", SLURM_PROCID="0",
        SLURM_STEP_NODELIST="here", SLURM_NTASKS="two",
    )  # fmt: skip
    assert run.returncode == 1 and run.stderr == ""
    started, cache, slurm = [line for line in run.stdout.splitlines() if "PROBLEM" in line]
    assert f"jax does not start: JAX_PLATFORMS={missing}, but jax starts no such" in started
    assert started.endswith(f": pip install 'instella-jax[{missing}]', or unset it.")
    assert "cannot be kept in /proc/a" in cache
    assert slurm.endswith("SLURM_NTASKS is 'two': expected a whole number.")


@pytest.mark.slow
def test_this_machine_is_examined():
    run = visit()
    assert "backend     " in run.stdout, run.stderr
    lines = dict(
        line.split(maxsplit=1) for line in run.stdout.splitlines() if "PROBLEM" not in line
    )
    assert lines["attention"].startswith("xla") and "jaxlib" in lines["packages"]
    assert (run.returncode == 0) == ("PROBLEM" not in run.stdout)
    assert "tiny step" in run.stdout
