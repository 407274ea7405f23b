"""The one error that a user's mistake raises."""


class UserError(Exception):
    """A mistake in what the user gave: one sentence saying what was wrong and what to do.

    Command-line entry points print it without a traceback and exit with status 2.
    """
