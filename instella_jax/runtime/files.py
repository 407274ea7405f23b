"""Files and folders that appear whole or not at all, and locks between processes."""

import contextlib
import errno
import json
import logging
import os
import re
import secrets
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from instella_jax.errors import UserError

logger = logging.getLogger(__name__)


def printable(name: str | os.PathLike[str]) -> str:
    r"""Return a file name that can be printed and stored: a byte that is not UTF-8 as `\xff`."""
    return os.fspath(name).encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a path beside `path`; the file written there takes its name when the block ends well.

    The file is on disk before it has the name, and the name before the block is left: after a crash
    there is either the old file or the new one.

    Raises:
      OSError: it cannot be written, with the number and the path; the old file stays.
    """
    path = Path(path)
    scratch = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        yield scratch
        put_in_place(scratch, path)
    except Exception as error:
        # Libraries in Rust raise errors of their own, with the number in the text.
        found = re.search(r"\(os error (\d+)\)", str(error))
        number = error.errno if isinstance(error, OSError) else found and int(found[1])
        if number is None and not isinstance(error, OSError):
            raise
        reason = os.strerror(number) if number else str(error)
        raise OSError(number or errno.EIO, reason, str(path)) from error
    finally:
        scratch.unlink(missing_ok=True)


def put_in_place(scratch: Path, path: Path) -> None:
    """Give a file the name of another one when it is on disk."""
    _sync(scratch)
    os.replace(scratch, path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        # Some network file systems cannot do it, to folders above all.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(handle)


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a file, whole or not at all; see `replacing`."""
    with replacing(path) as scratch:
        scratch.write_bytes(data)


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write a JSON file, whole or not at all; see `replacing`."""
    text = json.dumps(value, indent=1, ensure_ascii=False) + "\n"
    # Half of a surrogate pair, as in names that are not UTF-8, is spelled as JSON spells it.
    write_bytes(path, text.encode("utf-8", "backslashreplace"))


class Locked(Exception):
    """Raised where another process holds a lock; the text says which one, where that is known."""


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock that a file stands for.

    The kernel lets go of it when this process ends, however it ends. Where the file system has no
    locks, that is said and the block runs without.

    Raises:
      Locked: another process holds it.
    """
    handle = None
    try:
        import fcntl

        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with contextlib.suppress(OSError):  # a full disk takes the name of the holder only
            os.ftruncate(handle, 0)
            os.write(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    except (ImportError, OSError) as error:
        if handle is not None and getattr(error, "errno", 0) in (errno.EWOULDBLOCK, errno.EACCES):
            holder = os.read(handle, 200).decode(errors="replace").strip()
            os.close(handle)
            raise Locked(holder) from None
        logger.warning("another process at the same work is not noticed: no lock on %s (%s)",
                       path, error)  # fmt: skip
    try:
        yield
    finally:
        if handle is not None:
            os.close(handle)


@contextlib.contextmanager
def fresh_folder(out: Path) -> Iterator[Path]:
    """Yield an empty folder beside `out`, which takes that name when the block ends well.

    Raises:
      UserError: `out` is there already, or cannot be written.
    """
    if out.exists() or out.is_symlink():
        raise UserError(f"{out} is there already: give another --out or move it away")
    out = out.absolute()
    missing = [parent for parent in out.parents if not parent.exists()]
    scratch = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        scratch.mkdir(parents=True)
        yield scratch
        os.rename(scratch, out)
    except BaseException as error:
        shutil.rmtree(scratch, ignore_errors=True)
        for parent in missing:
            with contextlib.suppress(OSError):
                parent.rmdir()
        if isinstance(error, OSError):
            raise UserError(f"cannot write {out} ({error.strerror or error})") from None
        raise
