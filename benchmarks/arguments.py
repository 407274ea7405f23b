"""Numbers on a benchmark's command line: argparse refuses others in a sentence."""

import argparse
import math
from collections.abc import Callable


def whole(least: int = 1) -> Callable[[str], int]:
    """Return what reads a whole number of at least `least`, which is 0 or more."""

    def read(text: str) -> int:
        if not (text.isascii() and text.isdigit()) or int(text) < least:
            raise argparse.ArgumentTypeError(
                f"{text!r}: expected a whole number of at least {least}"
            )
        return int(text)

    return read


def whole_list(text: str) -> list[int]:
    """Read whole numbers of at least 0 with commas between them."""
    return [whole(0)(part) for part in text.split(",")]


def seconds(text: str) -> float:
    """Read a time above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r}: expected seconds, more than 0")
    return value
