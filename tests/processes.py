"""Programs with worker processes, started in a session of their own, and who is left of them."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.paths import ROOT

PATIENCE = 120.0


class Program:
    """A running Python program; all its processes are ended when the context ends."""

    def __init__(self, *arguments, around=()):
        self.process = subprocess.Popen(
            [*around, sys.executable, *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.communicate()

    def pids(self, what=""):
        """The living processes of the session whose command line has a text in it."""
        found = []
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                state, _, _, session = stat.read_text().rpartition(")")[2].split()[:4]
                command = stat.with_name("cmdline").read_bytes().replace(b"\0", b" ").decode()
                if int(session) == self.process.pid and state != "Z" and what in command:
                    found.append(int(stat.parent.name))
        return found

    def workers(self):
        return self.pids("multiprocessing.spawn")

    def wait_for_line(self, pattern):
        for line in self.process.stdout:
            if re.search(pattern, line):
                return
        raise AssertionError(f"no line {pattern!r}: {self.process.stderr.read()}")

    def wait_until(self, condition):
        """Wait for something, however slow the machine is; fail if the program ends before."""
        end = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < end, "it did not come about"
            time.sleep(0.01)

    def finish(self):
        """Exit status and stderr, once all of its processes are gone."""
        _, err = self.process.communicate(timeout=PATIENCE)
        self.wait_until(lambda: not self.pids())
        return self.process.returncode, err
