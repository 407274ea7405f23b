"""How long training waits for data, how much of it comes from where, and in what shapes."""

import collections
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
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
        self._shapes: collections.Counter[tuple[int, ...]] = collections.Counter()
        self._waited, self._since = 0.0, clock()

    def take(self, loader: Iterator[dict[str, Any]]) -> dict[str, Any]:
        """Returns the next batch of the loader."""
        start = self._clock()
        batch = next(loader)
        self._waited += self._clock() - start
        if self._names:
            numbers = np.ravel(batch["source"])
            self._counts += np.bincount(numbers, minlength=len(self._names))
        if "image" in batch:
            *leading, height, width, _ = batch["image"].shape
            self._shapes[height, width] += math.prod(leading)
        return batch

    def mean(self, values: Mapping[tuple[int, int], float]) -> float:
        """Returns the mean over the pictures since the last report of a value of their shape.

        Args:
          values: by height and width, for all shapes that there may be.
        """
        weights = [self._shapes[shape] for shape in values]
        if not any(weights):
            return float(np.mean(list(values.values())))
        return float(np.average(list(values.values()), weights=weights))

    def report(self) -> dict[str, float]:
        """Returns what is so since the last report, and begins anew.

        "data_wait" is the part of the time, 0 to 1, that `take` waited; "samples_<name>" how many
        samples came from each source; "samples_<height>x<width>" how many had each shape, where
        there was more than one.
        """
        now = self._clock()
        elapsed = max(now - self._since, 1e-9)
        counts = zip(self._names, self._counts.tolist(), strict=True)
        values = {f"samples_{name}": float(count) for name, count in counts}
        for (height, width), count in self._shapes.items():
            if len(self._shapes) > 1:
                values[f"samples_{height}x{width}"] = float(count)
            self._shapes[height, width] = 0
        values["data_wait"] = min(self._waited / elapsed, 1.0)
        self._waited, self._since = 0.0, now
        self._counts[:] = 0
        return values
