"""`--json`: the report of a command on standard output, and all else on standard error."""

import argparse
import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from typing import Any


def add_json(parser: argparse.ArgumentParser, returned: bool = True) -> None:
    """Add the flag to a command.

    Args:
      parser: of the command.
      returned: whether the command's function returns its report, which `cli` then prints, and does
        not print it itself.
    """
    parser.set_defaults(reports=returned)
    parser.add_argument(
        "--json", action="store_true",
        help="a report in JSON on standard output; all else goes to standard error",
    )  # fmt: skip


@contextlib.contextmanager
def reporting(as_json: bool) -> Iterator[Callable[[Any], None]]:
    """Yield what takes the report, None for none; with JSON all else goes to standard error."""
    if not as_json:
        yield lambda report: None
        return
    reports: list[Any] = []
    with contextlib.redirect_stdout(sys.stderr):
        yield reports.append
    for report in reports:
        if report is not None:
            print(json.dumps(report, default=str), flush=True)
