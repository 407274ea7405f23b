"""Compiled programs, kept in the user's own folder: whoever can write there can run code."""

import logging
import os
import tempfile
import time
import zlib
from pathlib import Path

logger = logging.getLogger(__name__)

_SECONDS_OF_A_WRITE = 60.0


def cache_folder() -> Path | None:
    """Return where compiled programs are kept: the user's own cache folder, or INSTELLA_JAX_CACHE.

    None where neither is there, as for a user without a name in a container.
    """
    given = os.environ.get("INSTELLA_JAX_CACHE")
    if given:
        return Path(given)
    try:
        root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError:  # there is no HOME, and the user is in no list
        return None
    return Path(root) / "instella_jax" / "xla"


def use_cache(seconds: float = 1.0) -> None:
    """Turn the persistent compilation cache on, for programs that took so long to compile."""
    import jax

    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        folder = cache_folder()
        if folder is None:
            logger.warning(
                "no compilation cache: this user has no home; INSTELLA_JAX_CACHE=FOLDER names one"
            )
            return
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            drop_damaged(folder)
            jax.config.update("jax_compilation_cache_dir", str(folder))
        except OSError as error:
            logger.warning("no compilation cache: %s cannot be written (%s)", folder, error)
    if not os.environ.get("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"):
        jax.config.update("jax_persistent_cache_min_compile_time_secs", seconds)


def can_keep() -> bool:
    """Return whether a file can be made in `cache_folder`, which is made for that."""
    folder = cache_folder()
    if folder is None:
        return False
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"x")
    except OSError:
        return False
    return True


def drop_damaged(folder: Path) -> None:
    """Remove what a killed process or a full disk cut short.

    jax writes an entry in place and never again: a damaged one would be compiled anew, with a
    warning, at every start. An entry is looked at once.

    Args:
      folder: of the entries; a file `.checked` there says until when they were looked at.

    Raises:
      OSError: the folder cannot be written.
    """
    marker = folder / ".checked"
    checked = marker.stat().st_mtime if marker.exists() else 0.0
    # What is younger may be being written by another process.
    now = time.time() - _SECONDS_OF_A_WRITE
    for path in folder.glob("*-cache"):
        try:
            damaged = checked <= path.stat().st_mtime < now and not _is_whole(path.read_bytes())
        except FileNotFoundError:  # another process was faster
            continue
        if damaged:
            logger.warning("compiled program %s was cut short: removed", path)
            path.unlink(missing_ok=True)
    marker.touch()
    os.utime(marker, (now, now))


def _is_whole(entry: bytes) -> bool:
    """Return whether a zlib stream ends properly; of another kind (zstd) that is not known."""
    if entry and entry[0] != 0x78:
        return True
    stream = zlib.decompressobj()
    try:
        stream.decompress(entry)
    except zlib.error:
        return False
    return stream.eof
