"""One loader for every data source: shuffle, slice, transform, batch, prefetch, resume.

Axes: G steps per call, B batch, H height, W width, L text length.

A source is anything with `__len__` and `__getitem__(index) -> dict`; what it returns for an index
never changes, so the whole stream is a function of (source, seed) and the iterator's state is a
position in it. Shuffling is an index permutation computed on the fly: it costs nothing to set up,
however long the source.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from instella_jax.data.collate import Collate, TextEncoder, add_ids
from instella_jax.data.samples import BadSample, Sample, Source, Transform
from instella_jax.errors import UserError
from instella_jax.runtime.absl_flags import allow_unparsed_flags

if TYPE_CHECKING:
    import grain

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Several sources read by one loader, each in its own order and repeated as needed.

    Their samples get "source", int32, the number of the source that they are from.

    Attributes:
      parts: the sources; their samples must have the same keys.
      weights: shares of the samples in proportion, > 0, one for each source.
      numbers: of the sources, where they are not 0, 1, 2 ...
    """

    parts: tuple[Source, ...]
    weights: tuple[float, ...]
    numbers: tuple[int, ...] = ()

    def __len__(self) -> int:
        return sum(len(part) for part in self.parts)


@dataclasses.dataclass(frozen=True)
class Buckets:
    """Sources whose samples have shapes of their own: one of them makes each item of a loader.

    Which one is decided by the weights and the item's number alone, alike in all processes.

    Attributes:
      parts: the sources.
      weights: shares of the items in proportion, > 0, one for each source.
      transforms: what makes the samples of each source ready.
    """

    parts: tuple[Source | Mixture, ...]
    weights: tuple[float, ...]
    transforms: tuple[Transform, ...]

    def __len__(self) -> int:
        return sum(len(part) for part in self.parts)


class _SkipBad:
    """Counts and names the samples that are skipped; gives up when nothing else is left."""

    _PATIENCE = 10_000
    _MOST_NAMED = 100

    def __init__(self, source_length: int, named: set[str], once: bool, advice: str):
        # What is read once and gives nothing is told as soon as its last sample is left out.
        self._limit = source_length if once else min(2 * source_length + 64, self._PATIENCE)
        self._named, self._advice = named, advice
        self._in_a_row = 0
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())

    def __call__(self, read: Callable[..., Sample], *args: Any) -> Sample | None:
        """Return `read(*args)`, or None where it raises BadSample."""
        try:
            sample = read(*args)
        except BadSample as error:
            self._count(str(error))
            return None
        self._in_a_row = 0
        return sample

    def _count(self, reason: str) -> None:
        with self._lock:
            self._in_a_row += 1
            if reason not in self._named:
                self._named.add(reason)
                if len(self._named) <= self._MOST_NAMED:
                    logger.warning("skipped (%d so far): %s", len(self._named), reason)
                if len(self._named) == self._MOST_NAMED:
                    logger.warning("what is skipped from here on is only counted")
            if self._in_a_row >= self._limit:
                raise UserError(
                    f"{self._in_a_row} samples in a row could not be used, the last because "
                    f"{reason}; {self._advice}"
                )


class _GuardedSource:
    def __init__(self, source: Source, skip_bad: _SkipBad, number: int | None):
        self._source, self._skip_bad, self._number = source, skip_bad, number

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Any:
        sample = self._skip_bad(self._source.__getitem__, int(index))
        if sample is None or self._number is None:
            return sample
        return {**sample, "source": np.int32(self._number)}


class _GuardedTransform:
    def __init__(self, transform: Transform, skip_bad: _SkipBad):
        self._transform, self._skip_bad = transform, skip_bad

    def __call__(self, sample: Any, rng: np.random.Generator) -> Any:
        return self._skip_bad(self._transform, sample, rng)


def make_loader(
    source: Source | Mixture | Buckets,
    *,
    batch_size: int,
    seed: int,
    shuffle: bool = True,
    repeat: bool = True,
    transform: Transform | None = None,
    text_tokenizer: TextEncoder | None = None,
    max_length: int = 128,
    steps_per_call: int | None = None,
    drop_remainder: bool | None = None,
    advice: str = "check the data",
    workers: int = 0,
    threads: int | None = None,
    prefetch: int = 2,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.DatasetIterator:
    """Return an iterator over batches of `source` whose state saves and restores exactly.

    Batches hold "image" uint8 [B, H, W, 3], "text" (a list of B strings) and whatever else the
    samples have: arrays and numbers stacked, other values as lists. With a text tokenizer also
    "ids" int32 [B, L] and "mask" bool [B, L], L = max_length. With `steps_per_call=G` every leaf
    has a leading axis G ([G, B, H, W, 3]; "text" is G lists of B), G batches per item.

    A sample for which the source or the transform raises `BadSample` is left out and named once
    in the log. Nothing is repeated for it, and batches stay full: each row of the batches reads its
    own part of the stream (`data.rows`) and goes on with the next sample there. With `repeat`,
    "skipped_before" int32 [B] says how many a row has just left out.

    `get_state()` gives the position after the batch last returned, whatever has been prefetched;
    `set_state()` goes there. A state fits the same source, seed, batch size, workers and
    process_count that made it; `data.rows.share_state` makes it fit another process_count.
    `close()` stops the threads and worker processes; call it in the end.

    Args:
      source: Random access samples, or a mixture of such sources; a mixture without `repeat` ends
        with the source that is first used up. With workers > 0 it must pickle. Buckets need
        `repeat`, and bring transforms of their own.
      batch_size: Samples per batch of this process.
      seed: Any non-negative integer: decides the order and the transforms' random numbers.
      shuffle: A fresh permutation of the whole source in every epoch; else the source's order.
      repeat: Go round for ever; else one epoch, by one process.
      transform: `transform(sample, rng) -> sample`; rng is a function of (seed, index in the
        source, epoch) alone, whatever the number of processes.
      text_tokenizer: Encodes "text"; needs `encode(texts, max_length=, pad_to=)`.
      max_length: Fixed text length L.
      steps_per_call: G, or None for no group axis.
      drop_remainder: Leave out the last, short batch of a single epoch. Default: whether there is
        a group axis.
      advice: what the user should do where so many samples in a row cannot be used that it ends.
      workers: Processes that read and transform. 0: threads of this process.
      threads: Reading threads per process; 0 reads in the one prefetching thread, best for
        samples that are computed, not read. Default: 0 with workers, else up to 8.
      prefetch: Batches kept ready.
      process_index: This process, in [0, process_count).
      process_count: The processes that share the source. Their batches together are those of one
        process with process_count times the batch size, rows in the same order, whatever is left
        out.

    Raises:
      UserError: the source is too small to give one batch, or an argument is out of range.
    """
    import grain

    groups = steps_per_call or 1
    per_item = batch_size * groups
    if batch_size < 1 or groups < 1 or workers < 0 or seed < 0:
        raise UserError(
            f"batch_size and steps_per_call must be at least 1, workers and seed at least 0; got "
            f"{batch_size}, {steps_per_call}, {workers} and {seed}"
        )
    if not 0 <= process_index < process_count:
        raise UserError(f"process_index must be in [0, {process_count}); got {process_index}")
    if process_count > 1 and not repeat:
        raise ValueError("several processes share an endless source")
    if drop_remainder is None:
        drop_remainder = steps_per_call is not None
    if isinstance(source, Buckets):
        if not repeat or transform is not None:
            raise ValueError("buckets repeat, and have transforms of their own")
        buckets, shares = source, [len(range(process_index, len(source), process_count))]
    else:
        buckets = Buckets((source,), (1.0,), (transform or _as_it_is,))
        parts = source.parts if isinstance(source, Mixture) else (source,)
        shares = [len(range(process_index, len(part), process_count)) for part in parts]
    if min(shares) == 0 or (sum(shares) < per_item and drop_remainder and not repeat):
        raise UserError(
            f"{len(source)} samples over {process_count} process(es) do not fill one batch of "
            f"{per_item}; use more data or a smaller batch_size"
        )
    if threads is None:
        threads = 0 if workers else min(8, 2 * (os.cpu_count() or 1))
    # Buckets take turns: together they read ahead as far as one source would.
    ahead = max(threads, 2 * per_item // len(buckets.parts))
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead)
    rows = range(process_index * batch_size, (process_index + 1) * batch_size)
    collate = Collate(steps_per_call)
    named: set[str] = set()

    def batches_of(bucket: int) -> Any:
        source, transform = buckets.parts[bucket], buckets.transforms[bucket]
        skip_bad = _SkipBad(len(source), named, not repeat, advice)

        def stream(number: int, part: Source, mixed: bool) -> Any:
            # Grain seeds epoch e with seed + e: hashing keeps neighbouring seeds from sharing
            # epochs.
            entropy = [seed, number, bucket] if bucket else [seed, number] if number else seed
            order_seed, transform_seed = map(int, np.random.SeedSequence(entropy).generate_state(2))
            guarded = _GuardedSource(part, skip_bad, number if mixed else None)
            data = grain.MapDataset.source(guarded)
            if transform is not _as_it_is:
                data = data.random_map(_GuardedTransform(transform, skip_bad), seed=transform_seed)
            if shuffle:
                data = data.shuffle(seed=order_seed)
            return data.repeat() if repeat else data

        if isinstance(source, Mixture):
            numbers = source.numbers or range(len(source.parts))
            streams = [stream(n, part, True) for n, part in zip(numbers, source.parts, strict=True)]
            data = grain.MapDataset.mix(streams, weights=source.weights)
        else:
            data = stream(0, source, False)
        if not repeat:
            return data.to_iter_dataset(options).batch(
                per_item, drop_remainder=drop_remainder, batch_fn=collate
            )
        from instella_jax.data.rows import Rows

        total = batch_size * process_count
        return Rows(data, rows, total, groups, threads=threads, ahead=ahead).map(collate)

    streams = [batches_of(bucket) for bucket in range(len(buckets.parts))]
    if len(streams) == 1:
        (batches,) = streams
    else:
        batches = grain.IterDataset.mix(streams, weights=buckets.weights)
    if workers:
        allow_unparsed_flags()
        from instella_jax.data.workers import Workers

        batches = Workers(batches, workers, prefetch)
    if text_tokenizer is not None:
        # In this process even with workers: warnings about unknown words then come once.
        batches = batches.map(lambda batch: add_ids(batch, text_tokenizer, max_length))
    if prefetch:
        batches = grain.experimental.ThreadPrefetchIterDataset(
            batches, prefetch_buffer_size=prefetch
        )
    return iter(batches)


def _as_it_is(sample: Sample, _: np.random.Generator) -> Sample:
    """Change nothing."""
    return sample
