"""The compile cache after a write that was cut short, with real processes and jax's own files."""

import os
import subprocess
import sys

from instella_jax.runtime.compile_cache import drop_damaged

COMPILE = """
import jax
from instella_jax.runtime.compile_cache import use_cache
use_cache()
print(jax.jit(lambda x: x @ x.T)(jax.numpy.ones((3, 4)))[0, 0])
"""


def compile_in(folder):
    """Compiles in a new process; returns what it printed and the one entry that there is."""
    kept = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    result = subprocess.run(
        [sys.executable, "-c", COMPILE],
        env={
            **kept, "INSTELLA_JAX_CACHE": str(folder),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_PLATFORMS": "cpu",
        },
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    (entry,) = folder.glob("jit__lambda*-cache")
    return result.stdout + result.stderr, entry


def test_an_entry_that_was_cut_short_is_made_anew(tmp_path):
    _, entry = compile_in(tmp_path)
    whole = entry.read_bytes()
    for damaged in (
        whole[:-1],
        whole[: len(whole) // 2],
        b"",
        whole[:50] + b"x" * 50 + whole[100:],
    ):
        entry.write_bytes(damaged)
        minutes_ago = entry.stat().st_mtime - 600
        os.utime(entry, (minutes_ago, minutes_ago))
        (tmp_path / ".checked").unlink()
        printed, entry = compile_in(tmp_path)
        assert "was cut short: removed" in printed and "4.0" in printed
        assert "Error reading" not in printed
        assert len(entry.read_bytes()) == len(whole)


def test_what_may_be_being_written_or_was_checked_is_left_alone(tmp_path):
    entry = tmp_path / "jit_f-cache"
    entry.write_bytes(b"\x78half")
    drop_damaged(tmp_path)
    assert entry.exists()
    # It was written before the last look, at which it was whole.
    old = (tmp_path / ".checked").stat().st_mtime - 1
    os.utime(entry, (old, old))
    drop_damaged(tmp_path)
    assert entry.exists()
    (tmp_path / ".checked").unlink()
    drop_damaged(tmp_path)
    assert not entry.exists()
