"""Worker processes of the loader and of imports that are killed, interrupted or left alone."""

import io
import os
import shutil
import signal
import subprocess
import tarfile

import numpy as np
import pytest
from PIL import Image

from instella_jax.data.shards import ImageShards
from instella_jax.preparing.importing import import_dataset
from instella_jax.runtime.workers import worker_error
from tests.processes import Program

pytestmark = pytest.mark.slow

LOADER = """
import contextlib
import numpy as np
from instella_jax.data.loader import make_loader
from instella_jax.errors import command_line

class Squares:
    def __len__(self):
        return 1000

    def __getitem__(self, index):
        return {"image": np.full((64, 64, 3), index % 256, np.uint8), "text": "x"}

def main():
    loader = make_loader(Squares(), batch_size=16, seed=0, workers=2, prefetch=PREFETCH)
    with contextlib.closing(loader):
        for number, batch in enumerate(loader):
            if number == 10:
                print("running", flush=True)

if __name__ == "__main__":
    with command_line():
        main()
"""

IMPORT = """
import sys
from instella_jax.errors import command_line
from instella_jax.preparing.importing import import_dataset

if __name__ == "__main__":
    with command_line():
        show = lambda line: print(line, flush=True)
        import_dataset(sys.argv[1], sys.argv[2], workers=2, show=show)
"""


def loader(tmp_path, prefetch=2, **options):
    script = tmp_path / "loader.py"
    script.write_text(LOADER.replace("PREFETCH", str(prefetch)))
    return Program(script, **options)


def one_sentence(err):
    return err.startswith("error: ") and err.count("\n") == 1


@pytest.mark.parametrize("prefetch", [1, 2])
def test_a_killed_worker_of_the_loader_is_told_in_a_sentence(tmp_path, prefetch):
    with loader(tmp_path, prefetch) as program:
        program.wait_for_line("running")
        os.kill(program.workers()[0], signal.SIGKILL)
        status, err = program.finish()
    assert status == 2 and one_sentence(err), err
    assert "a worker process was killed (exit status -9), perhaps for want of memory" in err


def test_workers_of_the_loader_end_with_a_killed_process(tmp_path):
    with loader(tmp_path) as program:
        program.wait_for_line("running")
        assert len(program.workers()) == 2
        program.process.send_signal(signal.SIGKILL)
        status, err = program.finish()
    assert status == -signal.SIGKILL and "Traceback" not in err, err


@pytest.mark.parametrize("begin", ["started", "running"])
def test_ctrl_c_with_workers_of_the_loader_is_silent(tmp_path, begin):
    with loader(tmp_path) as program:
        if begin == "running":
            program.wait_for_line("running")
        program.wait_until(lambda: len(program.workers()) == 2)
        os.killpg(program.process.pid, signal.SIGINT)
        status, err = program.finish()
    assert (status, err) == (130, "")


def can_mount():
    if shutil.which("unshare") is None:
        return False
    mount = ["unshare", "-m", "sh", "-c", "mount -t tmpfs tmpfs /dev/shm"]
    return subprocess.run(mount, capture_output=True).returncode == 0


@pytest.mark.skipif(not can_mount(), reason="no file systems can be mounted here")
@pytest.mark.parametrize("size", ["4k", "64k"])
def test_shared_memory_that_is_too_small_is_told_in_a_sentence(tmp_path, size):
    mount = f'mount -t tmpfs -o size={size} tmpfs /dev/shm && exec "$0" "$@"'
    with loader(tmp_path, around=["unshare", "-m", "sh", "-c", mount]) as program:
        status, err = program.finish()
    assert status == 2 and one_sentence(err), err
    assert "/dev/shm (0.0" in err and "MiB) is too small for workers" in err
    assert "docker run --shm-size" in err


def test_other_errors_stay_themselves():
    assert worker_error(OSError(2, "No such file or directory"), "x") is None
    assert worker_error(RuntimeError("something else"), "x") is None


def write_tars(folder, tars=4, pictures=150):
    folder.mkdir()
    for number in range(tars):
        with tarfile.open(folder / f"{number}.tar", "w") as tar:
            for index in range(pictures):
                file, name = io.BytesIO(), f"{number:02d}{index:04d}"
                noise = np.random.default_rng(index).integers(0, 256, (256, 256, 3), np.uint8)
                Image.fromarray(noise).save(file, "png", compress_level=0)
                for end, content in (("png", file.getvalue()), ("txt", name.encode())):
                    info = tarfile.TarInfo(f"{name}.{end}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return folder


@pytest.fixture(scope="module")
def tars(tmp_path_factory):
    return write_tars(tmp_path_factory.mktemp("tars") / "in")


def texts(folder):
    source = ImageShards(folder)
    return [source.read(index)[0]["texts"] for index in range(len(source))]


@pytest.mark.parametrize("how", ["worker killed", "killed", "interrupted", "interrupted at once"])
def test_an_import_whose_workers_end_goes_on_later(tmp_path, tars, how):
    script, out = tmp_path / "script.py", tmp_path / "out"
    script.write_text(IMPORT)
    with Program(script, tars, out) as program:
        if how != "interrupted at once":
            # A unit is under way: its workers have begun to count.
            program.wait_for_line("unit [0-2]/4  [1-9]")
        program.wait_until(lambda: len(program.workers()) == 2)
        if how == "worker killed":
            os.kill(program.workers()[0], signal.SIGKILL)
        elif how == "killed":
            program.process.send_signal(signal.SIGKILL)
        else:
            os.killpg(program.process.pid, signal.SIGINT)
        status, err = program.finish()
    if how == "worker killed":
        assert status == 2 and one_sentence(err), err
        assert "a worker process was killed" in err
    elif how == "killed":
        assert status == -signal.SIGKILL and "Traceback" not in err, err
    else:
        assert (status, err) == (130, "")
    report = import_dataset(tars, out)
    assert report["kept"] == report["read"] == 600
    assert texts(out) == [[f"{n:02d}{i:04d}"] for n in range(4) for i in range(150)]
    assert not [path for path in (out / "shards").iterdir() if path.name.startswith(".")]
