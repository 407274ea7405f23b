"""How long training waits for data, and how much of it comes from where."""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np


class DataWatch:
    """Takes batches from a loader for the loop, and keeps count.

    What it says is of this process alone.
    """

    def __init__(self, names: Sequence[str] = (), clock: Callable[[], float] = time.perf_counter):
        """Begins to count.

        Args:
          names: of the sources that "source" in a batch numbers; () for batches without it.
          clock: returns seconds.
        """
        self._names, self._clock = list(names), clock
        self._counts = np.zeros(len(self._names), np.int64)
        self._waited, self._since = 0.0, clock()

    def take(self, loader: Iterator[dict[str, Any]]) -> dict[str, Any]:
        """Returns the next batch of the loader."""
        start = self._clock()
        batch = next(loader)
        self._waited += self._clock() - start
        if self._names:
            numbers = np.ravel(batch["source"])
            self._counts += np.bincount(numbers, minlength=len(self._names))
        return batch

    def report(self) -> dict[str, float]:
        """Returns what is so since the last report, and begins anew.

        "data_wait" is the part of the time, 0 to 1, that `take` waited; "samples_<name>" how many
        samples came from each source.
        """
        now = self._clock()
        elapsed = max(now - self._since, 1e-9)
        counts = zip(self._names, self._counts.tolist(), strict=True)
        values = {f"samples_{name}": float(count) for name, count in counts}
        values["data_wait"] = min(self._waited / elapsed, 1.0)
        self._waited, self._since = 0.0, now
        self._counts[:] = 0
        return values
