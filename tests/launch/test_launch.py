"""The launch scripts: what they print, that shellcheck has nothing to say, and real runs."""

import os
import shlex
import shutil
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from instella_jax.reporting.metrics import read_metrics
from tests.paths import ROOT

SCRIPTS = sorted((ROOT / "launch").glob("*.sh"))
TINY = ["--config=tests/tiny_tokenizer.py", "--config.mesh.data=2", "--config.run.cpu_devices=1"]

# Stands in for Slurm on this machine: two tasks of one step.
SRUN = """#!/usr/bin/env bash
while [[ "$1" == --* ]]; do shift; done
export SLURM_JOB_ID={port} SLURM_STEP_NODELIST=localhost SLURM_NTASKS=2 SLURM_STEP_NUM_NODES=1
SLURM_PROCID=0 SLURM_LOCALID=0 "$@" & first=$!
SLURM_PROCID=1 SLURM_LOCALID=1 "$@" & second=$!
wait $first && wait $second
"""


def launch(script, *arguments, **environ):
    # What is set already stays as it is, so nothing may be.
    unset = ("JAX_PLATFORMS", "XLA_FLAGS")
    ours = {name: value for name, value in os.environ.items() if name not in unset}
    return subprocess.run(
        ["bash", f"launch/{script}", *arguments],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=500,
        env={**ours, "PYTHON": sys.executable, **environ},
    )  # fmt: skip


def dry(script, *arguments, **environ):
    """What a dry run prints: settings by name, and the command's words."""
    result = launch(script, "--dry-run", *arguments, **environ)
    assert result.returncode == 0, result.stderr
    lines = [shlex.split(line) for line in result.stdout.splitlines()]
    settings = [words[1].split("=", 1) for words in lines if words[0] == "export"]
    return dict(settings), [words for words in lines if words[0] != "export"]


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def test_every_script_but_the_shared_ones_can_be_run():
    assert len(SCRIPTS) == 7
    for path in SCRIPTS:
        runnable = bool(path.stat().st_mode & stat.S_IXUSR)
        assert runnable == (path.name not in ("run.sh", "chip.sh")), path


def test_shellcheck_has_nothing_to_say():
    # Beside the interpreter, whose environment need not be the shell's.
    places = [str(Path(sys.executable).parent), os.environ["PATH"]]
    shellcheck = shutil.which("shellcheck", path=os.pathsep.join(places))
    assert shellcheck is not None, "pip install -e '.[test]' brings it"
    result = subprocess.run(
        [shellcheck, "-x", *(f"launch/{path.name}" for path in SCRIPTS)],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout


def test_one_machine_sets_what_the_chip_needs():
    words = ["--config=a.py:b", "--config.sample.prompt=two red hearts"]
    settings, ((python, *command),) = dry("one_machine.sh", "rocm", *words)
    assert python == sys.executable and command == ["-m", "instella_jax", *words]
    assert settings["JAX_PLATFORMS"] == "rocm" and settings["HSA_NO_SCRATCH_RECLAIM"] == "1"
    assert "--xla_gpu_enable_triton_gemm=false" in settings["XLA_FLAGS"].split()
    settings, _ = dry("one_machine.sh", "cuda", *words)
    assert settings["JAX_OPTIMIZATION_LEVEL"] == "O1"
    settings, _ = dry("one_machine.sh", "cpu", *words)
    assert settings == {"JAX_PLATFORMS": "cpu", "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}


def test_slurm_sets_what_the_chip_needs_where_it_is_told():
    """Several nodes of a chip need what one machine of it does."""
    for kind in ("cpu", "cuda", "rocm"):
        alone, _ = dry("one_machine.sh", kind, "--config=a.py")
        assert alone["JAX_PLATFORMS"] == kind
        assert dry("slurm.sh", "--config=a.py", KIND=kind)[0] == alone
    assert dry("slurm.sh", "--config=a.py")[0] == {"XLA_PYTHON_CLIENT_MEM_FRACTION": ".9"}
    result = launch("slurm.sh", "--config=a.py", KIND="abacus")
    assert result.returncode == 2 and "cuda or rocm" in result.stderr


def test_settings_reach_the_command(tmp_path):
    srun = tmp_path / "srun"
    srun.write_text('#!/bin/sh\necho "$XLA_FLAGS,$RCCL_MSCCL_ENABLE"\n')
    srun.chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    result = launch("slurm.sh", "--config=a.py", PATH=path, KIND="rocm")
    flags, msccl = result.stdout.splitlines()[-1].split(",")
    assert msccl == "0" and "--xla_gpu_enable_command_buffer=" in flags.split()
    assert len(flags.split()) == 6


def test_what_the_caller_has_set_holds():
    settings, _ = dry("one_machine.sh", "cuda", "--config=a.py", JAX_OPTIMIZATION_LEVEL="O0")
    assert settings["JAX_OPTIMIZATION_LEVEL"] == "O0"


def test_flags_for_xla_are_known_to_xla():
    settings, _ = dry("one_machine.sh", "rocm", "--config=a.py")
    result = subprocess.run(
        [sys.executable, "-c", "import jax; print(jax.devices())"],
        capture_output=True, text=True, check=False,
        env={**os.environ, "XLA_FLAGS": settings["XLA_FLAGS"], "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr


def test_processes_share_an_address():
    settings, commands = dry("processes.sh", "3", "--config=a.py", PORT="1234")
    assert settings == {"JAX_COORDINATOR_ADDRESS": "127.0.0.1:1234", "JAX_NUM_PROCESSES": "3"}
    assert {words[1] for words in commands} == {f"JAX_PROCESS_ID={index}" for index in range(3)}
    # Those of a run on several hosts, in whose shell this one is started.
    others = {"JAX_COORDINATOR_ADDRESS": "far:1", "JAX_NUM_PROCESSES": "4"}
    assert dry("processes.sh", "3", "--config=a.py", PORT="1234", **others)[0] == settings


def test_a_number_of_processes_is_one_of_at_least_1():
    for count in ("two", "0", "-1", "1.5", "", "2x", "--config=a.py"):
        result = launch("processes.sh", "--dry-run", count, "--config=a.py")
        assert result.returncode == 2 and "COUNT of at least 1" in result.stderr, count
        assert result.stderr.count("\n") == 1 and result.stdout == ""


def test_slurm_tpu_and_container_print_their_commands():
    _, ((srun, *command),) = dry("slurm.sh", "--config=a.py")
    assert srun == "srun"
    assert command[-3:] == ["instella_jax", "--config=a.py", "--distributed=slurm"]
    _, (command,) = dry("tpu_pod.sh", "pod", "zone", "--config=a.py", "--config.x=a b")
    assert command[0] == "gcloud" and "--zone=zone" in command and "--worker=all" in command
    # The remote shell takes the command apart once more.
    remote = shlex.split(command[-1].removeprefix("--command="))
    assert remote[-3:] == ["--config=a.py", "--config.x=a b", "--distributed=tpu"]
    _, (command,) = dry("rocm_container.sh", "--config=a.py", DATA="/pictures", IMAGE="image")
    assert command[:2] == ["docker", "run"] and "--volume=/pictures:/data:ro" in command
    assert "--device=/dev/kfd" in command and "image" in command


def test_without_arguments_they_say_how(tmp_path):
    # None of what the scripts would start is found there.
    bash, dirname = shutil.which("bash"), shutil.which("dirname")
    assert bash is not None and dirname is not None
    (tmp_path / "dirname").symlink_to(dirname)
    for path in SCRIPTS:
        if path.name in ("run.sh", "chip.sh"):
            continue
        for arguments in ((), ("--dry-run",)):
            result = subprocess.run(
                [bash, path, *arguments], cwd=ROOT, env={"PATH": str(tmp_path)},
                capture_output=True, text=True, check=False,
            )  # fmt: skip
            assert result.returncode == 2 and result.stdout == "", path
            assert result.stderr.startswith(f"usage: launch/{path.name}"), result.stderr
            assert result.stderr.count("\n") == 1


def test_an_unknown_machine_says_how():
    result = launch("one_machine.sh", "abacus", "--config=a.py")
    assert result.returncode == 2 and "cpu|cuda|rocm" in result.stderr


def test_one_failing_process_stops_the_others(tmp_path):
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\n[ "$JAX_PROCESS_ID" = 1 ] && exit 3\nexec sleep 400\n')
    python.chmod(0o755)
    result = launch("processes.sh", "2", "--config=a.py", PYTHON=str(python))
    assert result.returncode == 3


@pytest.mark.slow
@pytest.mark.parametrize(
    "script", ["processes.sh", pytest.param("slurm.sh", marks=pytest.mark.thorough)]
)
def test_two_processes_run(script, tmp_path):
    options = [*TINY, f"--workdir={tmp_path / 'run'}", "--config.train.steps=4"]
    environ = {"XLA_FLAGS": os.environ.get("XLA_FLAGS", "")}
    if script == "processes.sh":
        result = launch(script, "2", *options, PORT=str(free_port()), **environ)
    else:
        srun = tmp_path / "srun"
        srun.write_text(SRUN.format(port=free_port()))
        srun.chmod(0o755)
        path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
        result = launch(script, *options, PATH=path, **environ)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "2 process(es)" in result.stdout
    assert max(row["step"] for row in read_metrics(tmp_path / "run")) == 4
