"""Who the other processes are; and runs of two real processes against one."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from instella_jax.checkpoints.positions import share_state
from instella_jax.data.loader import make_loader
from instella_jax.data.samples import BadSample
from instella_jax.errors import UserError
from instella_jax.reporting.metrics import read_metrics
from instella_jax.runtime import distributed, sharding
from tests.paths import ROOT

LIMIT = 400
SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "node[003-004]",
    "SLURM_NTASKS": "16",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "3",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_GPUS_ON_NODE": "8",
}


def test_alone_without_a_word_and_when_told():
    assert distributed.detect({}) == distributed.Setup("alone")
    assert distributed.detect(SLURM, "off").how == "alone"


@pytest.mark.parametrize("through", ["flags", "environment"])
def test_flags_and_their_environment(through):
    if through == "flags":
        setup = distributed.detect(SLURM, "auto", "host:1", 2, 1)
    else:
        names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
        setup = distributed.detect(dict(zip(names, ("host:1", "2", "1"), strict=True)))
    assert (setup.how, setup.processes) == ("flags", 2)
    assert setup.options["coordinator_address"] == "host:1"
    assert (setup.options["num_processes"], setup.options["process_id"]) == (2, 1)
    # In a Slurm job, too, jax is not to ask Slurm.
    assert setup.options["cluster_detection_method"] == "deactivate"


@pytest.mark.parametrize(
    ("environ", "arguments"),
    [
        ({}, ("auto", None, 2, 0)),
        ({}, ("auto", "host:1", 2, None)),
        ({}, ("auto", "host", 2, 0)),
        ({}, ("auto", "host:1", 2, 2)),
        ({"JAX_NUM_PROCESSES": "two"}, ("auto",)),
        ({}, ("slurm",)),
    ],
)
def test_half_a_description_is_a_user_error(environ, arguments):
    with pytest.raises(UserError):
        distributed.detect(environ, *arguments)


def test_slurm_tasks_of_one_gpu_and_of_a_whole_node():
    setup = distributed.detect(SLURM)
    assert (setup.how, setup.processes) == ("slurm", 16)
    assert "local_device_ids" not in setup.options
    whole = distributed.detect({**SLURM, "SLURM_NTASKS": "2"})
    assert whole.options["local_device_ids"] == list(range(8))
    # A step may have fewer nodes than the job; where Slurm does not say, a task has one GPU.
    assert whole == distributed.detect({**SLURM, "SLURM_NTASKS": "2", "SLURM_NNODES": "4"})
    unsaid = {key: value for key, value in SLURM.items() if key != "SLURM_STEP_NUM_NODES"}
    for environ in (unsaid, {**unsaid, "SLURM_NNODES": "2"}, {**SLURM, "SLURM_GPUS_ON_NODE": ""}):
        setup = distributed.detect({**environ, "SLURM_NTASKS": "2"})
        assert setup.how == "slurm" and "local_device_ids" not in setup.options
    # One task, as in an interactive shell, is alone.
    assert distributed.detect({**SLURM, "SLURM_NTASKS": "1"}).how == "alone"


def test_tpu_pods_and_single_tpu_hosts():
    assert distributed.detect({"TPU_WORKER_HOSTNAMES": "a,b"}) == distributed.Setup("tpu", 0)
    assert distributed.detect({"MEGASCALE_COORDINATOR_ADDRESS": "a"}).how == "tpu"
    assert distributed.detect({"TPU_WORKER_HOSTNAMES": "localhost"}).how == "alone"
    assert distributed.detect({}, "tpu").how == "tpu"


def test_joining_hands_over_what_was_found(monkeypatch):
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **options: calls.append(options))
    distributed.join(distributed.Setup("alone"))
    distributed.join(distributed.Setup("tpu", 0))
    distributed.join(distributed.detect(SLURM))
    assert calls == [{}, {"cluster_detection_method": "slurm"}]

    for kind in (RuntimeError, ValueError):

        def fail(kind=kind, **_):
            raise kind("deadline\nexceeded")

        monkeypatch.setattr(jax.distributed, "initialize", fail)
        with pytest.raises(UserError, match="deadline exceeded"):
            distributed.join(distributed.Setup("tpu", 0))


def test_one_process_agrees_with_itself_at_once():
    mesh = sharding.make_mesh(dict(data=-1, fsdp=1, tensor=1))
    agreed = distributed.Agreement(mesh)
    assert not agreed(False) and agreed(True)


def test_votes_of_several_processes_are_counted_later(monkeypatch):
    mesh = sharding.make_mesh(dict(data=-1, fsdp=1, tensor=1))
    agreed = distributed.Agreement(mesh, delay=2)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert [agreed(wish) for wish in (False, True, False, False, False)] == [
        False, False, False, True, False,
    ]  # fmt: skip


class Numbers:
    def __init__(self, length, bad):
        self.length, self.bad = length, bad

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        if index in self.bad:
            raise BadSample(f"number {index}")
        return {"number": np.int64(index)}

    def __repr__(self):
        return f"Numbers({self.length})"


def read(count, batches, process_count=1, process_index=0, state=None, bad=()):
    """What some processes that read together find, and where that leaves this one."""
    loader = make_loader(
        Numbers(30, bad), batch_size=count, seed=3, process_count=process_count,
        process_index=process_index, steps_per_call=2,
    )  # fmt: skip
    if state is not None:
        loader.set_state(state)
    items = [next(loader) for _ in range(batches)]
    state = loader.get_state()
    loader.close()
    return [np.stack([item["number"], item["skipped_before"]]) for item in items], state


@pytest.mark.parametrize("bad", [(), (4, 9, 17)])
@pytest.mark.parametrize("processes", [2, 3])
def test_processes_make_together_the_batches_of_one(processes, bad):
    # 30 samples and batches of 6: epochs end within a batch of two steps.
    alone, _ = read(6, 7, bad=bad)
    parts = [read(6 // processes, 7, processes, index, bad=bad)[0] for index in range(processes)]
    for step, whole in enumerate(alone):
        together = np.concatenate([part[step] for part in parts], axis=2)
        np.testing.assert_array_equal(whole, together)


@pytest.mark.parametrize("bad", [(), (4, 9, 17)])
@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (3, 2)])
def test_a_position_goes_over_to_another_number_of_processes(before, after, bad):
    alone, _ = read(6, 7, bad=bad)
    states = [read(6 // before, 3, before, index, bad=bad)[1] for index in range(before)]
    parts = [
        read(6 // after, 4, after, index, share_state(states, index, after), bad)[0]
        for index in range(after)
    ]
    for step in range(4):
        together = np.concatenate([part[step] for part in parts], axis=2)
        np.testing.assert_array_equal(alone[3 + step], together)


def test_positions_of_worker_processes_go_over_too():
    workers = [
        {"states": [{"rows": [8, 9]}, {"rows": [4, 4]}, None], "cycle": 1},
        {"states": [{"rows": [8, 8]}, {"rows": [5, 4]}, None], "cycle": 1},
    ]
    whole = {"states": [{"rows": [8, 9, 8, 8]}, {"rows": [4, 4, 5, 4]}, None], "cycle": 1}
    assert share_state(workers, 0, 1) == whole
    assert [share_state([whole], index, 2) for index in (0, 1)] == workers


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def start(workdir, processes, *options, largest_file="unlimited"):
    """Starts a run of 1 or 2 processes with two devices in all; returns the processes.

    No file can grow over `largest_file` KiB.
    """
    port, started = free_port(), []
    for index in range(processes):
        command = [
            sys.executable, "-m", "instella_jax.main", "--config=tests/tiny_tokenizer.py",
            f"--workdir={workdir}", "--config.mesh.data=2",
            f"--config.run.cpu_devices={2 // processes}", *options,
        ]  # fmt: skip
        environ = {**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
        if processes > 1:
            command += [
                f"--coordinator_address=127.0.0.1:{port}", f"--num_processes={processes}",
                f"--process_id={index}",
            ]  # fmt: skip
        command = ["bash", "-c", f'ulimit -f {largest_file}; exec "$@"', "limited", *command]
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        started.append(subprocess.Popen(command, cwd=ROOT, env=environ, **pipes))
    return started


def finish(started, expected=0):
    """Waits for all; returns what they printed."""
    try:
        printed = [process.communicate(timeout=LIMIT)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    codes = [process.returncode for process in started]
    assert codes == [expected] * len(started), "\n".join(printed)
    return printed


def run(*arguments, **options):
    return finish(start(*arguments, **options))


def losses(workdir):
    rows = read_metrics(workdir)
    return {row["step"]: row["train/loss"] for row in rows if "train/loss" in row}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Workdir of a run of one process on two devices."""
    workdir = tmp_path_factory.mktemp("runs") / "one"
    run(workdir, 1, "--config.eval.pictures=3")
    return workdir


@pytest.mark.slow
def test_two_processes_train_as_one(undisturbed, tmp_path):
    first, second = run(tmp_path / "two", 2, "--config.eval.pictures=3")
    expected, got = losses(undisturbed), losses(tmp_path / "two")
    assert sorted(got) == sorted(expected) == list(range(1, 9))
    np.testing.assert_allclose(list(got.values()), list(expected.values()), rtol=1e-5)

    def heldout(workdir):
        return [row for row in read_metrics(workdir) if "heldout/loss" in row][-1]["heldout/loss"]

    assert heldout(tmp_path / "two") == pytest.approx(heldout(undisturbed), rel=1e-5)
    # One process tells of the run, and writes the model and the pictures.
    assert "2 process(es)" in first and "held out at step 8" in first
    assert "held out" not in second
    for name in ("model/tokenizer.safetensors", "samples/00000008.png"):
        assert (tmp_path / "two" / name).stat().st_size == (undisturbed / name).stat().st_size


@pytest.mark.thorough
def test_two_processes_go_on_where_one_was(undisturbed, tmp_path):
    """The other way round is in tests/data/test_data_of_processes.py."""
    workdir = tmp_path / "run"
    run(workdir, 1, "--config.train.steps=4")
    shutil.rmtree(workdir / "model")
    printed = run(workdir, 2, "--config.train.steps=8")
    assert "saved by 1 process(es), 2 go on" in printed[0]
    expected, got = losses(undisturbed), losses(workdir)
    assert sorted(got) == list(range(1, 9))
    np.testing.assert_allclose(list(got.values()), list(expected.values()), rtol=1e-5)


@pytest.mark.slow
def test_one_told_to_stop_stops_both_at_the_same_step(tmp_path):
    workdir = tmp_path / "run"
    options = ("--config.train.steps=100000", "--config.train.save_every=0")
    started = start(workdir, 2, *options)
    try:
        deadline = time.monotonic() + LIMIT
        while len(losses(workdir)) < 3:
            assert time.monotonic() < deadline and all(p.poll() is None for p in started)
            time.sleep(0.2)
        started[1].send_signal(signal.SIGTERM)
    except BaseException:
        for process in started:
            process.kill()
        raise
    first, _ = finish(started)
    last = max(losses(workdir))
    assert f"stopped at step {last}" in first
    (checkpoint,) = (path.name for path in (workdir / "checkpoints").iterdir() if path.is_dir())
    assert checkpoint == str(last) and last < 100_000
