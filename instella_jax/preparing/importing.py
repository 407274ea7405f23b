"""`data import`: pictures with captions in whatever form -> checked, filtered shards.

Every picture is decoded. What is left out is counted by reason and reported, with examples.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
import time
from collections.abc import Callable, Sequence
from concurrent import futures
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import active_children, get_context
from typing import Any

from instella_jax.data.captions import CAPTION_KEYS
from instella_jax.data.listing import WAYS
from instella_jax.errors import UserError
from instella_jax.preparing import inputs, readers
from instella_jax.preparing.filters import Filters, LeftOut, check_picture
from instella_jax.preparing.import_report import EXAMPLES, NAMES, Tally, caption_hint, summarize
from instella_jax.preparing.items import NO_CAPTION, NotRead, Problem
from instella_jax.preparing.jobs import Job
from instella_jax.preparing.readers import Unit
from instella_jax.runtime.files import write_json
from instella_jax.runtime.workers import begin_worker, starting_workers, worker_error

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Reading:
    """How the input is read; see `readers.read_unit`."""

    caption_keys: tuple[str, ...] = CAPTION_KEYS
    image_key: str = ""


def import_unit(
    job: Job, number: int, unit: Unit, reading: Reading, filters: Filters,
    tick: Callable[[], None] = lambda: None,
) -> None:  # fmt: skip
    """Write the shard of a unit and record what became of its pictures."""
    kept = captions = 0
    dropped, flaws, not_read = Tally(), Tally(), Tally()
    damaged: list[str] = []
    seen: dict[str, None] = {}

    with job.writer(number) as writer:
        for item in readers.read_unit(unit, reading.caption_keys, reading.image_key):
            if isinstance(item, Problem) and item.of_file:
                damaged.append(item.name)
                continue
            if isinstance(item, NotRead):
                not_read.add(item.name, item.kind)
                continue
            tick()
            if isinstance(item, Problem):
                dropped.add(item.name, item.reason, item.count)
                continue
            try:
                image, size = check_picture(item, filters, functools.partial(flaws.add, item.name))
            except LeftOut as reason:
                dropped.add(item.name, str(reason))
                if str(reason) == NO_CAPTION and len(seen) < NAMES:
                    seen |= dict.fromkeys(item.seen)
                continue
            writer.write({"key": item.name, "texts": item.texts, "size": size}, image)
            kept += 1
            captions += len(item.texts)
    result = {
        "kept": kept,
        "captions": captions,
        "dropped": dropped.numbers,
        "flaws": flaws.numbers,
        "examples": {**dropped.examples, **flaws.examples},
        "not_read": not_read.numbers,
        "not_read_examples": not_read.examples,
        "damaged": damaged[:EXAMPLES],
        "seen": list(seen)[:NAMES],
    }
    job.finish(number, kept, result)


def import_dataset(
    source: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    kind: str = "auto",
    split: str = "train",
    unit_size: int = 10_000,
    reading: Reading = Reading(),  # noqa: B008 (frozen)
    filters: Filters = Filters(),  # noqa: B008 (frozen)
    workers: int = 1,
    part: tuple[int, int] = (0, 1),
    show: Callable[[str], None] = lambda line: None,
) -> dict[str, Any] | None:
    """Import a data set; run again after any interruption, it goes on where it stopped.

    Args:
      source: what is imported, one or several; see `inputs.expand` and `readers.find_units`.
      out: folder of the shards.
      kind: see `readers.find_units`.
      split: of a TFDS data set.
      unit_size: pictures in a shard, of a folder and a TFDS data set.
      reading: where captions and pictures are.
      filters: what is kept.
      workers: processes; with 1 this one does the work. The main module of a program that asks for
        more must guard its top level by `if __name__ == "__main__"`.
      part: (I, N): this is host I of N that share the work and `out`.
      show: is given a line of progress after each picture.

    Returns:
      The report (also `report.json`), or None while other parts are not done.

    Raises:
      UserError: an argument cannot be used, nothing was kept, or a process was killed.
    """
    paths = inputs.expand([source] if isinstance(source, str | os.PathLike) else source)
    units, not_read = readers.find_all(
        paths, kind, split=split, size=unit_size, without=out, caption_keys=reading.caption_keys
    )
    absolute = [os.path.abspath(path) for path in paths]
    plan = {
        "source": absolute[0] if len(absolute) == 1 else absolute,
        "options": {**dataclasses.asdict(reading), **dataclasses.asdict(filters)},
    }
    job = Job(out, plan, [unit.name for unit in units])
    with job.claim(part) as todo:
        own = len(range(part[0], len(units), part[1]))
        known = [units[number].pictures for number in todo]
        progress = _Count(show, own - len(todo), own, sum(known) if all(known) else 0)
        work = [(job, number, units[number], reading, filters) for number in todo]
        if workers <= 1 or len(todo) <= 1:
            for arguments in work:
                import_unit(*arguments, tick=progress.tick)
                progress.unit()
        else:
            _spread(work, min(workers, len(todo)), progress)
    results = job.results()
    if results is None:
        return None
    report = summarize(results, not_read)
    write_json(job.folder / "report.json", report)
    if not report["kept"]:
        reasons = [f"{reason} {n}" for reason, n in report["dropped"].items()]
        if not report["read"]:
            reasons = [f"no pictures in {len(units)} file(s)"]
        if report["damaged_files"]:
            reasons.append(f"damaged files {report['damaged_files']}")
        named = ", ".join(map(str, paths[:EXAMPLES])) + (", ..." if len(paths) > EXAMPLES else "")
        hint = caption_hint(report)
        if not hint and NO_CAPTION in report["dropped"] and units[0].kind == "folder":
            beside = ", ".join(f"{n} {kind}" for kind, n in report["not_read"].items())
            hint = f"beside the pictures are {beside or 'no other files'}; expected {WAYS}"
        raise UserError(
            f"nothing of {named} was kept ({', '.join(reasons)}){f'; {hint}' if hint else ''}; "
            f"see {out}/report.json, and run the command again with other input or options"
        )
    job.complete("images", results, {"source": plan["source"]})
    return report


class _Count:
    """Counts units and pictures, and says how many there are."""

    def __init__(self, show: Callable[[str], None], done: int, total: int, expected: int):
        """Begin to count.

        Args:
          show: is given a line.
          done: units that were there already.
          total: units.
          expected: pictures in those that were not, 0 where that is not known.
        """
        self.pictures = 0
        self._show, self._done, self._total, self._expected = show, done, total, expected
        self._first, self._start = done, time.perf_counter()

    def tick(self) -> None:
        self.pictures += 1
        self.show()

    def unit(self) -> None:
        self._done += 1
        self.show()

    def show(self) -> None:
        self._show(self._line(time.perf_counter() - self._start))

    def _line(self, seconds: float) -> str:
        of = f"/{self._expected}" if self._expected else ""
        line = f"unit {self._done}/{self._total}  {self.pictures}{of} pictures"
        if seconds > 1:
            line += f"  {self.pictures / seconds:.0f} pictures/s"
        if self._done == self._total:
            return line
        # By pictures where their number is known, else by units.
        whole, part = self._total - self._first, self._done - self._first
        if self._expected:
            whole, part = self._expected, self.pictures
        if part:
            rest = max(whole - part, 0) * seconds / part
            line += (
                f"  about {rest / 60:.0f} min left" if rest > 90 else f"  about {rest:.0f} s left"
            )
        return line


def _spread(work: list[tuple], workers: int, progress: _Count) -> None:
    """Do the work in worker processes."""
    context = get_context("spawn")
    others = set(active_children())
    try:
        with starting_workers():
            counter = context.Value("q", 0)
            pool = futures.ProcessPoolExecutor(workers, context, _begin_worker, (counter,))
    except OSError as error:
        raise worker_error(error, "--workers") or error from None
    try:
        with starting_workers():
            waiting = {pool.submit(_work, arguments) for arguments in work}
        while waiting:
            done, waiting = futures.wait(waiting, 0.5, futures.FIRST_COMPLETED)
            progress.pictures = counter.value
            for future in done:
                future.result()
                progress.unit()
            progress.show()
    except BrokenProcessPool:
        raise UserError(
            "a worker process was killed, perhaps for want of memory; run the same command again, "
            "with fewer --workers: what is done stays"
        ) from None
    except BaseException:
        # What they are at is done anew by the next try: no need to wait for it.
        for process in set(active_children()) - others:
            process.terminate()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_counter: Any = None


def _begin_worker(counter: Any) -> None:
    global _counter
    _counter = counter
    begin_worker()


def _work(arguments: tuple) -> None:
    def tick() -> None:
        with _counter.get_lock():
            _counter.value += 1

    import_unit(*arguments, tick=tick)
