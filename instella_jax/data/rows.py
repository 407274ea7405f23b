"""Which samples of an endless stream each row of the batches reads.

Axes: G steps per call, B rows of one process in a batch.
"""

import collections
import functools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grain
import numpy as np


class Rows(grain.IterDataset):
    """Items of G batches, each a list of G * B samples; every row reads the stream on its own.

    Of `count` rows in all, row r reads samples r, r + count, r + 2 * count ... and leaves out those
    that cannot be used. No row knows of another, so that processes that each have some of the rows
    make together the batches that one process would make, whatever is left out.

    A sample gets "skipped_before", int32: how many its row has just left out.
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
        """Divide a stream.

        Args:
          stream: endless; a sample is a dict, or None where it cannot be used.
          rows: those of this process, B of them.
          count: rows of all processes.
          groups: G.
          threads: that read; 0 reads in the thread that asks.
          ahead: samples that the threads read ahead.
        """
        super().__init__(stream)
        self.stream, self.rows, self.count, self.groups = stream, rows, count, groups
        self.threads, self.ahead = threads, max(ahead, 1) if threads else 1

    def set_slice(self, sl: slice, sequential_slice: bool = False) -> None:
        """Keep only one worker's part of the stream; called by grain."""
        del sequential_slice
        self.stream = self.stream.slice(sl)

    def __iter__(self) -> grain.DatasetIterator:
        """Begin with the first samples."""
        return _RowsIterator(self)


class _RowsIterator(grain.DatasetIterator):
    """Its state is how far in the stream each row is: it is whole after every item."""

    def __init__(self, of: Rows):
        self._pool: ThreadPoolExecutor | None = None
        super().__init__()
        self._of = of
        # Slots of an item, in order, by the number of their row.
        self._slots = list(range(len(of.rows))) * of.groups
        self._go_to([0] * len(of.rows))

    def _go_to(self, read: Sequence[int]) -> None:
        """Begin where each row has read so many samples."""
        self._stop_reading()
        self._read, self._ordered = list(read), list(read)
        self._orders = [collections.deque() for _ in read]
        self._started = False

    def _stop_reading(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
            self._pool = None

    def _order(self, slot: int) -> None:
        """Have one more sample read for the row of a slot: now by a thread, or when it is
        wanted."""
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
        """Return the next sample of a row that can be used."""
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
        """Return how many samples each row has read, as numbers that JSON can hold."""
        return {"rows": list(self._read)}

    def set_state(self, state: dict[str, Any]) -> None:
        """Go to a state of an iterator of as many rows.

        Raises:
          ValueError: it is one of another number of rows.
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
