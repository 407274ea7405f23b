"""How long training waits for data, and in what shapes it comes."""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np


class DataWatch:
    """Takes batches of a process from its loader for the loop, and watches the clock."""

    def __init__(
        self,
        shapes: Sequence[tuple[int, int]] = (),
        *,
        clock: Callable[[], float] = time.perf_counter,
    ):
        """Begin.

        Args:
          shapes: height and width that "image" in a batch may have; counted if they are several.
          clock: returns seconds.
        """
        self._clock = clock
        self._shapes = dict.fromkeys(shapes if len(shapes) > 1 else (), 0)
        self._waited, self._since = 0.0, clock()
        self._seen: tuple[dict[str, Any], Any] | None = None

    def peek(self, loader: Any) -> dict[str, Any]:
        """Return the batch that the next call of `take` returns."""
        if self._seen is None:
            position = loader.get_state()
            self._seen = next(loader), position
        return self._seen[0]

    def put_back(self, loader: Any) -> None:
        """Set the loader back to before a batch that was peeked at and not taken."""
        if self._seen is not None:
            loader.set_state(self._seen[1])
            self._seen = None

    def take(self, loader: Iterator[dict[str, Any]]) -> dict[str, Any]:
        """Return the next batch of the loader."""
        start = self._clock()
        batch = self._seen[0] if self._seen else next(loader)
        self._seen = None
        self._waited += self._clock() - start
        if self._shapes:
            *leading, height, width, _ = batch["image"].shape
            self._shapes[height, width] += math.prod(leading)
        return batch

    def mean(self, values: Mapping[tuple[int, int], float]) -> float:
        """Return the mean of a value of the pictures' shapes, over all pictures taken so far.

        Args:
          values: by height and width, for all shapes that there may be.
        """
        weights = [self._shapes.get(shape, 0) for shape in values]
        return float(np.average(list(values.values()), weights=weights if any(weights) else None))

    def waited(self) -> float:
        """Return the part of the time, 0 to 1, that `take` waited since the last call of this."""
        now = self._clock()
        part = min(self._waited / max(now - self._since, 1e-9), 1.0)
        self._waited, self._since = 0.0, now
        return part
