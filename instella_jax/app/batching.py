"""Pictures that wait together are sampled together: a bounded queue and one thread that computes.

Axes: B pictures.
"""

import collections
import concurrent.futures
import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from instella_jax.errors import UserError

logger = logging.getLogger(__name__)

# For how long the first of a batch waits for others that come at the same moment, in seconds.
GATHER = 0.01


class Busy(UserError):
    """Raised where the queue is full."""


class Stopping(UserError):
    """Raised where the server is shutting down."""


class Cancelled(Exception):
    """Raised in the computation of pictures that nobody wants any more."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the pictures of a batch share.

    Attributes:
      model: name of the model.
      height: of the pictures in pixels.
      width: likewise.
      steps: of the diffusion sampler; an autoregressive model does not look at it.
      guidance_scale: diffusers' w, 1 more than the published g.
      temperature: of the guided logits.
      rho: exponent of the schedule of times.
      protocol: how bits are sampled between steps.
    """

    model: str
    height: int
    width: int
    steps: int
    guidance_scale: float
    temperature: float
    rho: float = 1.0
    protocol: int = 1


class Row(NamedTuple):
    """A picture to sample.

    Attributes:
      prompt: what it shows.
      negative_prompt: what guidance leads away from.
      seed: of its random numbers.
    """

    prompt: str
    negative_prompt: str
    seed: int


class Made(NamedTuple):
    """Pictures, and what each says of how it was made.

    Attributes:
      pictures: uint8 [B, height, width, 3].
      records: B of them, as JSON has it.
    """

    pictures: np.ndarray
    records: Sequence[dict[str, Any]]


# Called with steps done, steps in all, and uint8 [B, height, width, 3] as they look by then.
OnPreview = Callable[[int, int, np.ndarray], None]


class Compute(Protocol):
    """What samples a batch."""

    def __call__(
        self, settings: Settings, rows: Sequence[Row], on_preview: OnPreview | None
    ) -> Made:
        """Sample; what it raises goes to all who asked for a picture of the batch."""
        ...


class Job:
    """Pictures that were asked for at once."""

    def __init__(
        self, settings: Settings, rows: Sequence[Row], on_preview: OnPreview | None = None
    ):
        """Describe a job.

        Args:
          settings: of all its pictures.
          rows: the pictures, at least one.
          on_preview: called in the computing thread with all pictures of the job as they look
            after a step, those that are not begun in grey; None where nobody watches.
        """
        self.settings, self.rows, self.on_preview = settings, tuple(rows), on_preview
        self.future: concurrent.futures.Future[Made] = concurrent.futures.Future()
        self._pictures: list[np.ndarray | None] = [None] * len(self.rows)
        self._records: list[dict[str, Any]] = []
        self._begun = 0

    def cancel(self) -> None:
        """Say that nobody wants the pictures any more."""
        self.future.cancel()

    def result(self, timeout: float | None = None) -> Made:
        """Wait for the pictures."""
        return self.future.result(timeout)

    @property
    def left(self) -> int:
        """How many pictures nobody has begun."""
        return 0 if self.future.done() else len(self.rows) - self._begun

    def take(self, most: int) -> range:
        """Return the numbers of the next rows, at most so many, which are begun."""
        taken = range(self._begun, min(self._begun + most, len(self.rows)))
        self._begun = taken.stop
        return taken

    def finish(self, taken: range, made: Made) -> None:
        """Hand pictures over, in their order; the last ones complete the job."""
        self._pictures[taken.start : taken.stop] = list(made.pictures)
        self._records += made.records
        done = [picture for picture in self._pictures if picture is not None]
        if len(done) == len(self.rows) and not self.future.done():
            result = Made(np.stack(done), self._records)
            self._resolve(lambda: self.future.set_result(result))

    def fail(self, error: BaseException) -> None:
        """Hand an error over."""
        if not self.future.done():
            self._resolve(lambda: self.future.set_exception(error))

    def preview(self, taken: range, done: int, steps: int, pictures: np.ndarray) -> None:
        """Show how rows that are being computed look."""
        if self.on_preview is None or self.future.done():
            return
        grey = np.full_like(pictures[0], 128)
        shown = [grey if picture is None else picture for picture in self._pictures]
        shown[taken.start : taken.stop] = list(pictures)
        # Over all pictures of the job, those of earlier batches among them.
        before, own = taken.start * steps, len(taken) * done
        self.on_preview(before + own, len(self.rows) * steps, np.stack(shown))

    @staticmethod
    def _resolve(action: Callable[[], None]) -> None:
        try:
            action()
        except concurrent.futures.InvalidStateError:
            pass  # cancelled at this moment


class Batcher:
    """Computes jobs in the order of their coming, together with later ones of the same settings."""

    def __init__(self, compute: Compute, *, max_batch: int, max_waiting: int):
        """Start the thread that computes.

        Args:
          compute: samples at most `max_batch` pictures.
          max_batch: pictures in a batch.
          max_waiting: pictures that may wait; more are refused.
        """
        self._compute, self.max_batch, self.max_waiting = compute, max_batch, max_waiting
        self._jobs: collections.deque[Job] = collections.deque()
        self._changed = threading.Condition()
        self._stopping = False
        self._running = 0
        self.batches = 0
        self._thread = threading.Thread(target=self._work, name="sampling", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """How many pictures wait."""
        with self._changed:
            return self._count()

    @property
    def running(self) -> int:
        """How many pictures are being computed."""
        return self._running

    @property
    def stopping(self) -> bool:
        """Whether no more jobs are taken."""
        return self._stopping

    def ahead_of(self, job: Job) -> int:
        """Return how many pictures wait before a job's first one; 0 too where it has begun."""
        with self._changed:
            if job not in self._jobs:
                return 0
            jobs = list(self._jobs)
            return sum(other.left for other in jobs[: jobs.index(job)])

    def submit(self, job: Job) -> Job:
        """Put a job into the queue.

        Raises:
          Busy: there is no room.
          Stopping: the server is shutting down.
        """
        with self._changed:
            if self._stopping:
                raise Stopping("the server is shutting down")
            waiting = self._count()
            if waiting + len(job.rows) > self.max_waiting:
                raise Busy(
                    f"{waiting} pictures are waiting, and at most {self.max_waiting} may: try "
                    "again in a moment"
                )
            self._jobs.append(job)
            self._changed.notify_all()
        return job

    def drain(self, timeout: float) -> bool:
        """Take no more jobs and wait for those that are there; return whether all were done."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _count(self) -> int:
        return sum(job.left for job in self._jobs)

    def _work(self) -> None:
        while batch := self._take():
            rows = [job.rows[number] for job, taken in batch for number in taken]
            self._running = len(rows)
            try:
                self._run(batch, rows)
            finally:
                self._running = 0
                self.batches += 1

    def _take(self) -> list[tuple[Job, range]]:
        """Wait for jobs and return the next batch; nothing where the server is to end."""
        with self._changed:
            while True:
                while not self._count():
                    self._jobs.clear()
                    if self._stopping:
                        return []
                    self._changed.wait()
                if not self._stopping:
                    self._gather()
                # None where all were cancelled in that time.
                if batch := self._next():
                    return batch

    def _next(self) -> list[tuple[Job, range]]:
        """Take the first job's rows out of the queue, and those of later ones that go with it."""
        batch, room = [], self.max_batch
        settings = next((job.settings for job in self._jobs if job.left), None)
        for job in self._jobs:
            if room and job.left and job.settings == settings:
                batch.append((job, job.take(room)))
                room -= len(batch[-1][1])
        self._jobs = collections.deque(job for job in self._jobs if job.left)
        return batch

    def _gather(self) -> None:
        """Give those that come at the same moment the time to."""
        end = time.monotonic() + GATHER
        while self._count() < self.max_batch and (left := end - time.monotonic()) > 0:
            self._changed.wait(left)

    def _run(self, batch: list[tuple[Job, range]], rows: list[Row]) -> None:
        settings = batch[0][0].settings
        sizes = [len(taken) for _, taken in batch]
        starts = np.cumsum([0, *sizes[:-1]])

        def show(done: int, steps: int, pictures: np.ndarray) -> None:
            if all(job.future.cancelled() for job, _ in batch):
                raise Cancelled
            for (job, taken), start in zip(batch, starts, strict=True):
                job.preview(taken, done, steps, pictures[start : start + len(taken)])

        watched = any(job.on_preview is not None for job, _ in batch)
        try:
            made = self._compute(settings, rows, show if watched else None)
        except Cancelled:
            return
        except Exception as error:
            if not isinstance(error, UserError):
                logger.exception("a batch of %d pictures failed", len(rows))
            for job, _ in batch:
                job.fail(error)
            return
        for (job, taken), start in zip(batch, starts, strict=True):
            own = slice(start, start + len(taken))
            job.finish(taken, Made(made.pictures[own], made.records[own]))
