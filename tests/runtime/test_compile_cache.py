"""The compile cache after a write that was cut short, with real processes and jax's own files."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from instella_jax.runtime.compile_cache import cache_folder, drop_damaged, use_cache

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


@pytest.fixture
def environ(monkeypatch, tmp_path):
    """Sets the variables that decide where the cache is, and no others of them."""
    names = ("INSTELLA_JAX_CACHE", "XDG_CACHE_HOME", "JAX_COMPILATION_CACHE_DIR")

    def set_only(**values):
        for name in names:
            monkeypatch.delenv(name, raising=False)
        for name, value in values.items():
            monkeypatch.setenv(name, str(value))

    set_only(HOME=tmp_path / "home")
    return set_only


@pytest.fixture
def settings(monkeypatch):
    """What jax is told."""
    told = {}
    monkeypatch.setattr(
        type(jax.config), "update", lambda self, name, value: told.update({name: value})
    )
    return told


def test_where_compiled_programs_are_kept(environ, tmp_path):
    assert cache_folder() == tmp_path / "home/.cache/instella_jax/xla"
    environ(XDG_CACHE_HOME=tmp_path / "xdg")
    assert cache_folder() == tmp_path / "xdg/instella_jax/xla"
    environ(XDG_CACHE_HOME=tmp_path / "xdg", INSTELLA_JAX_CACHE=tmp_path / "own")
    assert cache_folder() == tmp_path / "own"


def test_nobody_else_may_write_where_programs_are_kept(environ, settings, tmp_path):
    before = os.umask(0)
    try:
        use_cache()
    finally:
        os.umask(before)
    folder = Path(settings["jax_compilation_cache_dir"])
    assert folder == tmp_path / "home/.cache/instella_jax/xla"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_a_folder_that_jax_was_given_stays(environ, settings, tmp_path):
    environ(JAX_COMPILATION_CACHE_DIR=tmp_path / "of jax")
    use_cache()
    assert "jax_compilation_cache_dir" not in settings
    assert not (tmp_path / "home").exists()


def test_a_folder_that_cannot_be_written_is_said(environ, settings, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    environ(INSTELLA_JAX_CACHE=tmp_path / "file" / "cache")
    use_cache()
    assert "no compilation cache: " in caplog.text and "jax_compilation_cache_dir" not in settings
