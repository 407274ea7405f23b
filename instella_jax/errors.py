"""The one error that a user's mistake raises, and how a command tells of it."""

import contextlib
import errno
import gc
import io
import sys
import traceback
from collections.abc import Iterator
from typing import NoReturn


class UserError(Exception):
    """A mistake in what the user gave: one sentence saying what was wrong and what to do.

    Command-line entry points run inside `command_line`, which prints it without a traceback.
    """


class BadValue(UserError, ValueError):
    """A `UserError` for those who call from Python, and expect a `ValueError`."""


@contextlib.contextmanager
def value_errors() -> Iterator[None]:
    """Raise a `BadValue` in the place of any other `UserError`; also a decorator."""
    try:
        yield
    except BadValue:
        raise
    except UserError as error:
        raise BadValue(str(error)) from error.__cause__


def disk_remedy(error: OSError) -> str | None:
    """Return what to do about a disk that cannot be written; None where an error is another."""
    if error.errno == errno.EROFS:
        return "make the disk writable"
    return "make room" if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else None


def disk_error(error: OSError) -> UserError | None:
    """Return the sentence for a disk that cannot be written; None where an error is another."""
    if (remedy := disk_remedy(error)) is None:
        return None
    what = f"cannot write {error.filename}" if error.filename else "cannot write"
    return UserError(
        f"{what} ({error.strerror}); {remedy} and run the same command again: what is done stays"
    )


@contextlib.contextmanager
def command_line() -> Iterator[None]:
    """End the process with status 2 and a sentence at a user's mistake, with 130 at Ctrl-C.

    A disk without room, or one that cannot be written, is told so too. What is printed inside may
    hold any characters, whatever the terminal or the log takes.
    """
    for stream in (sys.stdout, sys.stderr):
        # What cannot be written, as in ASCII, is spelled, for example \u732b.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        yield
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        _exit(2, error)
    except OSError as error:
        if (told := disk_error(error)) is None:
            raise
        print(f"error: {told}", file=sys.stderr)
        _exit(2, error)
    except KeyboardInterrupt as error:
        _exit(130, error)


def _exit(status: int, error: BaseException | None) -> NoReturn:
    """End the process, and before it whatever an error holds: threads and worker processes."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
    gc.collect()
    sys.exit(status)
