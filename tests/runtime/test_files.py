"""Files that are replaced whole or not at all, and locks, with the kernel's own limits."""

import contextlib
import errno
import json
import os
import resource
import signal
import subprocess
import sys

import numpy as np
import pytest

from instella_jax.runtime import files
from tests.paths import ROOT


@contextlib.contextmanager
def largest_file(size):
    """No file can grow over a size: what is written then fails as it does on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def write_tensors(path, value):
    from safetensors.numpy import save_file

    with files.replacing(path) as scratch:
        save_file({"x": np.full(len(value), 1.0)}, scratch)


@pytest.mark.parametrize(
    "write",
    [lambda path, text: files.write_bytes(path, text.encode()), files.write_json, write_tensors],
)
def test_what_cannot_be_written_leaves_the_old_file(tmp_path, write):
    path = tmp_path / "a"
    write(path, "old")
    before = path.read_bytes()
    with largest_file(500), pytest.raises(OSError) as raised:
        write(path, "new" * 1000)
    assert raised.value.errno == errno.EFBIG and raised.value.filename == str(path)
    assert str(raised.value) == f"[Errno 27] File too large: '{path}'"
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
    write(path, "new" * 1000)
    assert path.read_bytes() != before and list(tmp_path.iterdir()) == [path]


def test_an_error_of_the_caller_stays_itself(tmp_path):
    with pytest.raises(ZeroDivisionError), files.replacing(tmp_path / "a") as scratch:
        scratch.write_text("half")
        1 / 0  # noqa: B018
    assert not list(tmp_path.iterdir())


def test_a_file_is_on_disk_before_it_has_its_name(tmp_path, monkeypatch):
    path, seen = tmp_path / "a", []
    fsync, replace = os.fsync, os.replace

    def noted_fsync(handle):
        seen.append(os.readlink(f"/proc/self/fd/{handle}"))
        fsync(handle)

    def noted_replace(source, target):
        seen.append((str(source), str(target)))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    files.write_bytes(path, b"x")
    (scratch, target) = seen[1]
    assert seen == [scratch, (scratch, str(path)), str(tmp_path)] and target == str(path)


def test_json_holds_names_that_are_not_utf8(tmp_path):
    name = os.fsdecode(b"caf\xe9 \xc3\xbc")
    files.write_json(tmp_path / "a", {name: [1, None]})
    assert json.loads((tmp_path / "a").read_text(encoding="utf-8")) == {name: [1, None]}


HOLD = """
import pathlib, sys, time
from instella_jax.runtime.files import locked
with locked(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(1000)
"""


def test_a_lock_is_held_by_one_process_until_it_ends_however_it_ends(tmp_path):
    path = tmp_path / "lock"
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, path],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    try:
        assert process.stdout is not None and process.stdout.readline() == b"held\n"
        held = f"^process {process.pid} on "
        with pytest.raises(files.Locked, match=held), files.locked(path):
            pass
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    with files.locked(path):
        assert path.read_text().startswith(f"process {os.getpid()} on ")


FULL = """
import resource, sys
from instella_jax.errors import command_line
from instella_jax.runtime.files import write_json
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
with command_line():
    write_json(sys.argv[1], "new" * 1000)
"""


def test_a_full_disk_ends_a_command_with_a_sentence(tmp_path):
    path = tmp_path / "a.json"
    files.write_json(path, "old")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", FULL, path]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (
        2,
        f"error: cannot write {path} (File too large); make room and run the same command again: "
        "what is done stays\n",
    )
    assert json.loads(path.read_text()) == "old" and list(tmp_path.iterdir()) == [path]


def test_a_disk_that_fails_is_an_error_and_one_that_cannot_sync_is_none(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def answer(number):
        def fsync(_):
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(os, "fsync", fsync)

    answer(errno.EIO)
    with pytest.raises(OSError) as error:
        files.write_bytes(path, b"new")
    assert error.value.errno == errno.EIO and path.read_bytes() == b"old"
    for number in (errno.EINVAL, errno.ENOTSUP):
        answer(number)
        files.write_bytes(path, str(number).encode())
        assert path.read_bytes() == str(number).encode()
