"""Assign the samples of an endless stream to the rows of a batch.

Axes: G steps per call, B rows of a batch in one process.
"""

import collections
import functools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grain
import numpy as np


class Rows(grain.IterDataset):
    """Items of G batches, each a list of G * B samples; every row has its share of the stream.

    Of `count` rows in total, row r reads samples r, r + count, r + 2 * count, ... and skips those
    that are unusable. Rows are independent of each other, so several processes that divide the rows
    among them produce the same batches as a single process, whatever is skipped.

    "skipped_before" of a sample, int32, is the number of samples its row skipped just before it.
    """

    def __init__(
        self,
        stream: grain.MapDataset,
        rows: range,
        count: int,
        groups: int,
        *,
        threads: int,
        ahead: int,
    ):
        """Divide a stream among rows.

        Args:
          stream: endless; a sample is a dict, or None if it is unusable.
          rows: the B rows of this process.
          count: number of rows of all processes.
          groups: G.
          threads: number of reader threads; 0 reads in the calling thread.
          ahead: number of samples that the threads prefetch.
        """
        super().__init__(stream)
        self.stream, self.rows, self.count, self.groups = stream, rows, count, groups
        self.threads, self.ahead = threads, max(ahead, 1) if threads else 1

    def set_slice(self, sl: slice, sequential_slice: bool = False) -> None:
        """Keep only one worker's part of the stream; called by grain."""
        del sequential_slice
        self.stream = self.stream.slice(sl)

    def __iter__(self) -> grain.DatasetIterator:
        """Start at the first samples."""
        return _RowsIterator(self)


class _RowsIterator(grain.DatasetIterator):
    """Iterates over items; its state, the position of each row, is consistent after every item."""

    def __init__(self, of: Rows):
        self._pool: ThreadPoolExecutor | None = None
        super().__init__()
        self._of = of
        # The row of each slot of an item.
        self._slots = list(range(len(of.rows))) * of.groups
        self._go_to([0] * len(of.rows))

    def _go_to(self, read: Sequence[int]) -> None:
        """Start where each row has read the given number of samples."""
        self._stop_reading()
        self._read, self._ordered = list(read), list(read)
        self._orders = [collections.deque() for _ in read]
        self._started = False

    def _stop_reading(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
            self._pool = None

    def _order(self, slot: int) -> None:
        """Request one more sample for the row of a slot: a thread reads it now, or the caller
        later."""
        row = slot % len(self._of.rows)
        place = self._ordered[row] * self._of.count + self._of.rows[row]
        read = functools.partial(self._of.stream.__getitem__, place)
        self._orders[row].append(self._pool.submit(read).result if self._pool else read)
        self._ordered[row] += 1

    def __next__(self) -> list[dict[str, Any]]:
        """Return the samples of the next item."""
        if not self._started:
            self._started = True
            if self._of.threads:
                self._pool = ThreadPoolExecutor(self._of.threads, thread_name_prefix="rows")
            for slot in range(self._of.ahead):
                self._order(slot)
        return [self._sample(slot, row) for slot, row in enumerate(self._slots)]

    def _sample(self, slot: int, row: int) -> dict[str, Any]:
        """Return the next usable sample of a row."""
        skipped = 0
        while (sample := self._take(row)) is None:
            skipped += 1
            self._order(row)
        self._order(slot + self._of.ahead)
        return {**sample, "skipped_before": np.int32(skipped)}

    def _take(self, row: int) -> dict[str, Any] | None:
        sample = self._orders[row].popleft()()
        self._read[row] += 1
        return sample

    def get_state(self) -> dict[str, Any]:
        """Return the number of samples that each row has read; can be written as JSON."""
        return {"rows": list(self._read)}

    def set_state(self, state: dict[str, Any]) -> None:
        """Restore a state of an iterator with the same number of rows.

        Raises:
          ValueError: the number of rows differs.
        """
        if len(state["rows"]) != len(self._of.rows):
            raise ValueError(
                f"the position is one of {len(state['rows'])} rows, not {len(self._of.rows)}"
            )
        self._go_to(state["rows"])

    def close(self) -> None:
        """Stop the threads."""
        self._stop_reading()
        super().close()
