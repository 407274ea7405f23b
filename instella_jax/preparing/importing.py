"""`data import`: pictures with captions in whatever form -> checked, filtered shards.

Every picture is decoded. What is left out is counted by reason and reported, with examples.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import logging
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent import futures
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import active_children, get_context
from typing import Any

from instella_jax.data import jpeg_damage
from instella_jax.data.captions import CAPTION_KEYS
from instella_jax.data.images import (
    TOO_LARGE,
    BadPicture,
    decode_picture,
    is_picture,
    log_flaw,
    read_size,
)
from instella_jax.data.listing import WAYS
from instella_jax.errors import UserError
from instella_jax.preparing import inputs, readers
from instella_jax.preparing.items import NO_CAPTION, UNPAIRED, WATERMARK, Item, NotRead, Problem
from instella_jax.preparing.jobs import Job
from instella_jax.preparing.readers import Unit
from instella_jax.runtime.files import write_json
from instella_jax.runtime.workers import begin_worker, starting_workers, worker_error

logger = logging.getLogger(__name__)

_EXAMPLES, _NAMES = 5, 30


@dataclasses.dataclass(frozen=True)
class Filters:
    """What is kept (see "Published recipe" in docs/model.md).

    Attributes:
      min_side: the shorter side in pixels, at least; 0: any.
      max_watermark: score of a watermark ("pwatermark"), at most; pictures without one are kept.
      max_aspect: longer side over shorter side, at most; 0: any.
      captions: whether a picture needs a caption.
    """

    min_side: int = 0
    max_watermark: float = 0.5
    max_aspect: float = 0.0
    captions: bool = True

    def __post_init__(self) -> None:
        """Check ranges.

        Raises:
          UserError: a value is out of range.
        """
        if self.min_side < 0:
            raise UserError(f"--min-side is {self.min_side}: expected at least 0")
        if not 0 <= self.max_watermark <= 1:
            raise UserError(f"--max-watermark is {self.max_watermark:g}: expected 0 to 1")
        if self.max_aspect and not self.max_aspect >= 1:
            raise UserError(f"--max-aspect is {self.max_aspect:g}: expected 1 or more, or 0: any")


@dataclasses.dataclass(frozen=True)
class Reading:
    """How the input is read; see `readers.read_unit`."""

    caption_keys: tuple[str, ...] = CAPTION_KEYS
    image_key: str = ""


class _LeftOut(Exception):
    """Raised with the reason why a picture is left out."""


def check_picture(
    item: Item, filters: Filters, on_flaw: Callable[[str], None] = log_flaw
) -> tuple[bytes, tuple[int, int]]:
    """Return the file and the size, width and height as shown, of a picture that is kept.

    `on_flaw` is given what is wrong with it all the same.

    Raises:
      _LeftOut: with the reason why it is not.
    """
    from PIL import Image

    if item.image is None:
        raise _LeftOut("no picture")
    if filters.captions and not item.texts:
        raise _LeftOut(NO_CAPTION)
    if _watermark(item.meta) > filters.max_watermark:
        raise _LeftOut("watermark")
    if len(item.image) > readers.MAX_BYTES:
        raise _LeftOut("file too large")
    try:
        width, height = read_size(io.BytesIO(item.image), item.name)
    except BadPicture as error:
        raise _LeftOut(error.reason) from None
    # By its header first: what is filtered out need not be decoded.
    if width * height > (Image.MAX_IMAGE_PIXELS or math.inf):
        raise _LeftOut(TOO_LARGE)
    if min(width, height) < filters.min_side:
        raise _LeftOut("too small")
    if filters.max_aspect and max(width, height) > filters.max_aspect * min(width, height):
        raise _LeftOut("aspect ratio")
    try:
        # Damage shows at a fraction of the size too.
        decode_picture(io.BytesIO(item.image), item.name, decode_side=256, on_flaw=on_flaw)
    except BadPicture as error:
        raise _LeftOut(error.reason) from None
    if item.image.startswith(jpeg_damage.START):
        if jpeg_damage.is_damaged(item.image):
            raise _LeftOut(jpeg_damage.DAMAGED)
        if not jpeg_damage.can_check():
            on_flaw(jpeg_damage.NOT_CHECKED)
    return item.image, (width, height)


def _watermark(meta: Mapping[str, Any]) -> float:
    """Return the score of a watermark, 0 where there is none: null, NaN or no number."""
    for key, value in meta.items():
        if key.lower() == WATERMARK:
            with contextlib.suppress(TypeError, ValueError):
                score = float(value)
                return 0.0 if math.isnan(score) else score
    return 0.0


@dataclasses.dataclass
class Tally:
    """Counts by reason, with the first few examples of each."""

    numbers: dict[str, int] = dataclasses.field(default_factory=dict)
    examples: dict[str, list[str]] = dataclasses.field(default_factory=dict)

    def add(self, name: str, reason: str, number: int = 1) -> None:
        """Count something that is named by one name."""
        self.merge({reason: number}, {reason: [name]})

    def merge(self, numbers: Mapping[str, int], examples: Mapping[str, Sequence[str]]) -> None:
        """Add the counts of another tally."""
        for reason, number in numbers.items():
            self.numbers[reason] = self.numbers.get(reason, 0) + number
            names = self.examples.setdefault(reason, [])
            names += examples[reason][: _EXAMPLES - len(names)]


def _most_first(numbers: Mapping[str, int]) -> dict[str, int]:
    return dict(sorted(numbers.items(), key=lambda entry: -entry[1]))


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
            except _LeftOut as reason:
                dropped.add(item.name, str(reason))
                if str(reason) == NO_CAPTION and len(seen) < _NAMES:
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
        "damaged": damaged[:_EXAMPLES],
        "seen": list(seen)[:_NAMES],
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
        named = ", ".join(map(str, paths[:_EXAMPLES])) + (", ..." if len(paths) > _EXAMPLES else "")
        hint = _caption_hint(report)
        if not hint and NO_CAPTION in report["dropped"] and units[0].kind == "folder":
            beside = ", ".join(f"{n} {kind}" for kind, n in report["not_read"].items())
            hint = f"beside the pictures are {beside or 'no other files'}; expected {WAYS}"
        raise UserError(
            f"nothing of {named} was kept ({', '.join(reasons)}){f'; {hint}' if hint else ''}; "
            f"see {out}/report.json, and run the command again with other input or options"
        )
    job.complete("images", results, {"source": plan["source"]})
    return report


def summarize(
    results: Sequence[Mapping[str, Any]], not_read: Iterable[NotRead] = ()
) -> dict[str, Any]:
    """Add up the results of units, and files that belong to none.

    All of "read" is in "kept" or "dropped"; "not_read" counts files of other kinds.
    """
    dropped, flaws, others = Tally(), Tally(), Tally()
    for result in results:
        dropped.merge(result["dropped"], result["examples"])
        flaws.merge(result.get("flaws", {}), result["examples"])
        others.merge(result.get("not_read", {}), result.get("not_read_examples", {}))
    for file in not_read:
        others.add(file.name, file.kind)
    kept = sum(result["kept"] for result in results)
    return {
        "read": kept + sum(dropped.numbers.values()),
        "kept": kept,
        "captions": sum(result["captions"] for result in results),
        "bytes": sum(result["shard"]["bytes"] for result in results if result["shard"]),
        "shards": sum(result["shard"] is not None for result in results),
        "dropped": _most_first(dropped.numbers),
        "flaws": _most_first(flaws.numbers),
        "examples": {**dropped.examples, **flaws.examples},
        "not_read": _most_first(others.numbers),
        "not_read_examples": others.examples,
        # Nobody knows how many pictures were in what could not be read of them.
        "damaged_files": sum(bool(result["damaged"]) for result in results),
        "damage": [place for result in results for place in result["damaged"]][:_EXAMPLES],
        # Columns, keys and files beside the pictures without a caption.
        "seen": list(dict.fromkeys(name for r in results for name in r.get("seen", ())))[:_NAMES],
    }


def report_lines(report: Mapping[str, Any]) -> Iterator[str]:
    """Format a report as lines."""
    yield (
        f"kept {report['kept']} of {report['read']} pictures with {report['captions']} captions "
        f"in {report['shards']} shard(s), {report['bytes'] / 2**20:.1f} MiB"
    )
    for reason, number in report["dropped"].items():
        yield f"  left out, {reason}: {number} ({_some(report['examples'][reason], number)})"
    if {NO_CAPTION, UNPAIRED} <= report["dropped"].keys():
        yield (
            "  a picture and its caption go together by their names, 000123.jpg and 000123.txt or "
            "000123.json, and only within one tar"
        )
    if hint := _caption_hint(report):
        yield f"  {hint}"
    for flaw, number in report["flaws"].items():
        yield f"  kept as it is, {flaw}: {number} ({_some(report['examples'][flaw], number)})"
    for kind, number in report["not_read"].items():
        yield f"  not read, {kind}: {number} ({_some(report['not_read_examples'][kind], number)})"
    if any(is_picture(f"a{kind}") for kind in report["not_read"]):
        yield (
            "  pictures beside tar or Parquet files are read by --kind=folder, into a folder of "
            "their own"
        )
    if report["damaged_files"]:
        places = ", ".join(report["damage"])
        yield f"  damaged files, read in part: {report['damaged_files']} ({places})"


def _caption_hint(report: Mapping[str, Any]) -> str:
    """Say where captions could have been; "" where none was missed."""
    if not report["seen"]:
        return ""
    return (
        f"pictures without a caption have {', '.join(report['seen'])}: name what their captions "
        "are in by --caption-keys, or keep them by --no-captions"
    )


def _some(examples: Sequence[str], number: int) -> str:
    return ", ".join(examples) + (", ..." if number > len(examples) else "")


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
