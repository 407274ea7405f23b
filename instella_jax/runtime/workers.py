"""Worker processes that end with this one, leave Ctrl-C to it, and fail in a sentence."""

import contextlib
import errno
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator
from multiprocessing import parent_process, resource_tracker

from instella_jax.errors import UserError

SHARED_MEMORY = "/dev/shm"


def begin_worker(*_: int) -> None:
    """Set a worker process up: Ctrl-C is the parent's to handle, and nobody outlives the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def follow() -> None:
        parent = parent_process()
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


@contextlib.contextmanager
def starting_workers() -> Iterator[None]:
    """Keep Ctrl-C from worker processes that this thread starts, from their first moment.

    They inherit what the thread blocks; until `begin_worker` they would print what they were at.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        _start_tracker()
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_tracker() -> None:
    """Start the process that frees the shared memory of workers that were killed.

    It would warn of every piece, after the sentence that says what has happened.
    """
    quiet = "ignore:resource_tracker:UserWarning"
    sys.warnoptions.append(quiet)
    try:
        resource_tracker.ensure_running()
    finally:
        sys.warnoptions.remove(quiet)


def worker_error(error: Exception, option: str) -> UserError | None:
    """Return the sentence for an error by which a worker process, or the want of one, is told.

    Args:
      error: one of grain's or of multiprocessing.
      option: that says how many workers there are.

    Returns:
      None where it is something else.
    """
    ended = re.search(r"terminated unexpectedly with exit code (-?\d+)", str(error))
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.ENOMEM):
        return _no_room(option)
    if ended is None:
        return None
    # Memory that is promised but not there ends a process when it writes to it.
    if int(ended[1]) == -signal.SIGBUS:
        return _no_room(option)
    return UserError(
        f"a worker process was killed (exit status {ended[1]}), perhaps for want of memory; run "
        f"the same command again, with fewer {option}: what is saved stays"
    )


def _no_room(option: str) -> UserError:
    return UserError(
        f"{SHARED_MEMORY}{_size()} is too small for {option}: give it more, in a container by "
        "docker run --shm-size=8g, or set the workers to 0"
    )


def _size() -> str:
    """Return how large shared memory is, in words."""
    try:
        stat = os.statvfs(SHARED_MEMORY)
    except OSError:
        return ""
    return f" ({stat.f_blocks * stat.f_frsize / 2**20:.3g} MiB)"
