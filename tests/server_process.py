"""`instella-jax app` as a process of its own."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time

from tests.paths import ROOT


@contextlib.contextmanager
def serving(*arguments, **environment):
    """Start the server on a free port; yields its process, with its `url`, and ends it."""
    # As a user's process has it: one CPU device, however many the tests make.
    own = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": "", **environment}
    command = [sys.executable, "-m", "instella_jax", "app", "--port=0", *arguments]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT, env=own
    )
    try:
        said = []
        for line in process.stdout:
            said.append(line)
            if found := re.search(r"at (http://[^/ ]+)", line):
                process.url = found[1]
                break
        else:
            raise AssertionError("".join(said))
        yield process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        end = time.monotonic() + 90
        while process.poll() is None and time.monotonic() < end:
            time.sleep(0.05)
        process.kill()
        process.stdout.close()
        process.wait()
