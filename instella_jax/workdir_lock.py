"""One run at a time on a workdir."""

import contextlib
import errno
import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np

from instella_jax.errors import UserError

logger = logging.getLogger(__name__)

LOCK = ".lock"


@contextlib.contextmanager
def only_run(workdir: str | os.PathLike[str]) -> Iterator[None]:
    """Holds a workdir for the run of this process and those that it has joined.

    The kernel lets go of the lock when the first process ends, however it ends.

    Raises:
      UserError: another run holds it.
    """
    from jax.experimental import multihost_utils

    path = Path(workdir) / LOCK
    handle, holder = _lock(path) if jax.process_index() == 0 else (None, None)
    try:
        taken = bool(multihost_utils.broadcast_one_to_all(np.bool_(holder is not None)))
        if taken:
            raise UserError(
                f"workdir {workdir} is in use by another run{holder or ''}: wait until that has "
                "ended, or choose another --workdir"
            )
        yield
    finally:
        if handle is not None:
            os.close(handle)


def _lock(path: Path) -> tuple[int | None, str | None]:
    """Returns the open lock file, and who holds it where that is not this process."""
    try:
        import fcntl

        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except (ImportError, OSError) as error:
        logger.warning("two runs on one workdir are not noticed: no lock on %s (%s)", path, error)
        return None, None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            text = os.read(handle, 200).decode(errors="replace").strip()
            os.close(handle)
            return None, f" ({text})" if text else ""
        logger.warning("two runs on one workdir are not noticed: no lock on %s (%s)", path, error)
        return handle, None
    with contextlib.suppress(OSError):  # a full disk takes the name of the holder only
        os.ftruncate(handle, 0)
        os.write(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    return handle, None
