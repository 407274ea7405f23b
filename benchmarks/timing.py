"""What the benchmarks share: timing alternatives side by side, and saying on what device."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np

from instella_jax.runtime.devices import find_devices


class Spread(NamedTuple):
    """Seconds of repeated calls."""

    median: float
    least: float
    most: float

    def __str__(self) -> str:
        """Median, then the range."""
        return f"{self.median:10.4f} ({self.least:.4f} to {self.most:.4f})"


def spread(seconds: Sequence[float]) -> Spread:
    """Summarise the seconds of repeated calls, at least one."""
    return Spread(statistics.median(seconds), min(seconds), max(seconds))


def where() -> str:
    """Return the version of jax, the device and how many there are.

    Raises:
      UserError: jax does not start.
    """
    devices = find_devices()
    return f"jax {jax.__version__}, {len(devices)} x {devices[0].device_kind}"


def compare(
    calls: Mapping[str, Callable[[], jax.Array]], repeats: int
) -> tuple[dict[str, list[float]], bool]:
    """Time alternatives in turns, so that other programs slow down all of them alike.

    Args:
      calls: alternatives, each returning an array; the first call of each compiles.
      repeats: timed calls of each, at least 1.

    Returns:
      Seconds of the calls by alternative, and whether all returned the same array.
    """
    results = [np.asarray(call()) for call in calls.values()]
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            start = time.perf_counter()
            call().block_until_ready()
            times[name].append(time.perf_counter() - start)
    return times, all(np.array_equal(results[0], other) for other in results[1:])
