"""Thousands of files through a network: read in threads, computed in batches, written in threads.

What goes wrong with one file is told of that file, and the others go on.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np

from instella_jax.data.samples import BadSample
from instella_jax.errors import UserError, disk_error
from instella_jax.runtime import sharding


@dataclasses.dataclass(frozen=True)
class Entry:
    """A file to read and the file to make of it."""

    source: Path
    target: Path


@dataclasses.dataclass(frozen=True)
class Work:
    """What has been read of a file.

    Attributes:
      key: files of the same one may share a batch.
      file: what is known beside.
      rows: what goes through the network, [T, ...].
    """

    key: Hashable
    file: Any
    rows: np.ndarray


class _Open:
    """A file of which not all rows have come back."""

    def __init__(self, entry: Entry, work: Work):
        self.entry, self.work = entry, work
        self.results: list[Any] = [None] * len(work.rows)
        self.missing = len(work.rows)


Outcome = tuple[Entry, dict[str, Any] | Exception]


def stream(
    entries: Sequence[Entry],
    read: Callable[[Entry], Work],
    dispatch: Callable[[Any, np.ndarray], jax.Array],
    finish: Callable[[Entry, Any, np.ndarray], dict[str, Any]],
    *,
    batch_size: int,
    threads: int,
) -> Iterator[Outcome]:
    """Yield each file with what `finish` says of it, or with why it was refused.

    Args:
      entries: the files.
      read: called in a thread.
      dispatch: begins to compute a batch of rows of one key; the first rows of its result are
        theirs.
      finish: called in a thread, with what `read` knew and the results [T, ...].
      batch_size: rows at a time.
      threads: that read and write.

    Raises:
      OSError: the disk is full, or cannot be written at all.
    """
    ahead = 4 * threads
    waiting: dict[Any, list[tuple[_Open, int]]] = {}
    flying: list[tuple[list[tuple[_Open, int]], jax.Array]] = []
    reading: deque[tuple[Entry, Future[Work]]] = deque()
    finishing: deque[tuple[Entry, Future[dict[str, Any]]]] = deque()
    rest = iter(entries)

    def land(pool: ThreadPoolExecutor) -> None:
        members, begun = flying.pop(0)
        for (opened, index), row in zip(members, sharding.fetch(begun), strict=False):
            opened.results[index] = row
            opened.missing -= 1
            if not opened.missing:
                results = np.stack(opened.results)
                job = pool.submit(finish, opened.entry, opened.work.file, results)
                finishing.append((opened.entry, job))

    def send(pool: ThreadPoolExecutor, key: Any) -> None:
        members = waiting.pop(key)
        rows = np.stack([opened.work.rows[index] for opened, index in members])
        flying.append((members, dispatch(key, rows)))
        # The devices work on this batch while the one before it is written.
        if len(flying) > 1:
            land(pool)

    with ThreadPoolExecutor(threads) as pool:
        while True:
            while len(reading) < ahead and (entry := next(rest, None)) is not None:
                reading.append((entry, pool.submit(read, entry)))
            if not reading:
                break
            entry, future = reading.popleft()
            try:
                opened = _Open(entry, future.result())
            except (BadSample, UserError, OSError) as error:
                yield entry, _of_one_file(error)
                continue
            for index in range(len(opened.results)):
                members = waiting.setdefault(opened.work.key, [])
                members.append((opened, index))
                if len(members) == batch_size:
                    send(pool, opened.work.key)
            yield from _settled(finishing, ahead)
        for key in list(waiting):
            send(pool, key)
        while flying:
            land(pool)
        yield from _settled(finishing, 0)


def _settled(
    finishing: deque[tuple[Entry, Future[dict[str, Any]]]], keep: int
) -> Iterator[Outcome]:
    """Yield the oldest files until so few are left."""
    while len(finishing) > keep:
        entry, future = finishing.popleft()
        try:
            yield entry, future.result()
        except (BadSample, UserError, OSError) as error:
            yield entry, _of_one_file(error)


def _of_one_file(error: Exception) -> Exception:
    """Return an error that concerns one file.

    Raises:
      OSError: it concerns all.
    """
    if isinstance(error, OSError) and disk_error(error) is not None:
        raise error
    return error
