"""The one error that a user's mistake raises, and how a command tells of it."""

import contextlib
import sys
from collections.abc import Iterator


class UserError(Exception):
    """A mistake in what the user gave: one sentence saying what was wrong and what to do.

    Command-line entry points run inside `command_line`, which prints it without a traceback.
    """


@contextlib.contextmanager
def command_line() -> Iterator[None]:
    """End the process with status 2 and a sentence at a user's mistake, with 130 at Ctrl-C."""
    try:
        yield
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
