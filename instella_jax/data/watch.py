"""How long training waits for data, how much of it comes from where, and in what shapes."""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np


class DataWatch:
    """Takes batches from a loader for the loop, and keeps count.

    What it says is of this process alone, save for the samples that were skipped.
    """

    def __init__(
        self,
        names: Sequence[str] = (),
        shapes: Sequence[tuple[int, int]] = (),
        clock: Callable[[], float] = time.perf_counter,
    ):
        """Begins to count.

        Args:
          names: of the sources that "source" in a batch numbers; () for batches without it.
          shapes: height and width that "image" in a batch may have; counted if they are several.
          clock: returns seconds.
        """
        self._names, self._clock = list(names), clock
        self._counts = np.zeros(len(self._names), np.int64)
        self._shapes = dict.fromkeys(shapes if len(shapes) > 1 else (), 0)
        self._reported = dict(self._shapes)
        self._waited, self._since = 0.0, clock()
        self._skipped = 0.0

    def take(self, loader: Iterator[dict[str, Any]]) -> dict[str, Any]:
        """Returns the next batch of the loader."""
        start = self._clock()
        batch = next(loader)
        self._waited += self._clock() - start
        if self._names:
            numbers = np.ravel(batch["source"])
            self._counts += np.bincount(numbers, minlength=len(self._names))
        if self._shapes:
            *leading, height, width, _ = batch["image"].shape
            self._shapes[height, width] += math.prod(leading)
        return batch

    def skip(self, samples: float) -> None:
        """Counts samples that all processes have left out for a finished step."""
        self._skipped += samples

    def mean(self, values: Mapping[tuple[int, int], float]) -> float:
        """Returns the mean of a value of the pictures' shapes, over all pictures taken so far.

        Args:
          values: by height and width, for all shapes that there may be.
        """
        weights = [self._shapes.get(shape, 0) for shape in values]
        return float(np.average(list(values.values()), weights=weights if any(weights) else None))

    def report(self) -> dict[str, float]:
        """Returns what is so since the last report, and begins anew.

        "data_wait" is the part of the time, 0 to 1, that `take` waited; "samples_<name>" how many
        samples came from each source; "samples_<height>x<width>" how many had each of several
        shapes; "skipped_samples" how many could not be used, each time that one came up.
        """
        now = self._clock()
        elapsed = max(now - self._since, 1e-9)
        counts = zip(self._names, self._counts.tolist(), strict=True)
        values = {f"samples_{name}": float(count) for name, count in counts}
        for (height, width), count in self._shapes.items():
            values[f"samples_{height}x{width}"] = float(count - self._reported[height, width])
        self._reported = dict(self._shapes)
        values["skipped_samples"] = self._skipped
        values["data_wait"] = min(self._waited / elapsed, 1.0)
        self._waited, self._since, self._skipped = 0.0, now, 0.0
        self._counts[:] = 0
        return values
