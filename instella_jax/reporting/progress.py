"""How far a run is, shown on a terminal or in a log, and how fast it goes.

Neither tqdm nor rich does both: off a terminal tqdm rewrites its line all the same, which makes one
long line of a log file, and rich writes nothing before the end. Both count pauses, such as an
evaluation, into the rate and the time left.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, TextIO

# Shown first and in this order; whatever else a step reports goes to the files.
_ON_THE_LINE = ("loss", "bit_accuracy", "psnr")


class Throughput:
    """Steps per second over the recent past, with pauses (compiling, evaluation) left out."""

    def __init__(self, window: float = 30.0, clock: Callable[[], float] = time.perf_counter):
        """Begin without a measurement.

        Args:
          window: Seconds of running that the rate is taken over.
          clock: Returns seconds.
        """
        self._window, self._clock = window, clock
        self._marks: list[tuple[float, int]] = []
        self._paused = 0.0
        self._pause_start: float | None = None

    def update(self, step: int) -> None:
        """Note that `step` is done. The first call only starts the measurement."""
        now = self._clock() - self._paused
        self._marks.append((now, step))
        while len(self._marks) > 2 and now - self._marks[1][0] >= self._window:
            del self._marks[0]

    def pause(self) -> None:
        """Stop the clock; does nothing when it stands already."""
        if self._pause_start is None:
            self._pause_start = self._clock()

    def resume(self) -> None:
        """Let the clock run on."""
        if self._pause_start is not None:
            self._paused += self._clock() - self._pause_start
            self._pause_start = None

    @property
    def steps_per_second(self) -> float | None:
        """Steps per second, > 0, or None before two updates."""
        if len(self._marks) < 2:
            return None
        (start, first), (end, last) = self._marks[0], self._marks[-1]
        return (last - first) / (end - start) if end > start and last > first else None


def progress_line(
    step: int,
    total: int,
    metrics: Mapping[str, Any],
    steps_per_second: float | None = None,
    batch_size: int = 1,
    noun: str = "step",
) -> str:
    """Return e.g. "step 120/400  loss 0.3121  bit accuracy 0.874  103 images/s  ETA 1:02".

    Args:
      step: Steps done.
      total: Steps in all.
      metrics: Numbers by name; loss, bit_accuracy and psnr are shown where they are there.
      steps_per_second: The rate, when it is known.
      batch_size: Images per step.
      noun: What is counted.
    """
    parts = [f"{noun} {step:>{len(str(total))}}/{total}"]
    for name in _ON_THE_LINE:
        if name in metrics:
            parts.append(f"{name.replace('_', ' ')} {float(metrics[name]):.4f}")
    if steps_per_second:
        parts.append(f"{steps_per_second * batch_size:.3g} images/s")
        parts.append(f"ETA {_duration((total - step) / steps_per_second)}")
    return "  ".join(parts)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(max(seconds, 0.0)), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d {hours:02d}:{minutes:02d}:{seconds:02d}"
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


class Progress:
    """One rewritten line on a terminal; elsewhere a plain line at a time.

    Lines that must stay go through `message`, which takes care of the rewritten one.
    """

    def __init__(
        self,
        stream: TextIO | None = None,
        *,
        enabled: bool = True,
        interval: float = 0.0,
        prefix: str = "",
        clock: Callable[[], float] = time.monotonic,
    ):
        """Show nothing yet.

        Args:
          stream: Where lines go, standard output when None.
          enabled: False shows nothing, as in every process but the first.
          interval: Seconds from one line to the next; at most 0.5 on a terminal. A line that comes
            sooner is shown by `close` if no other follows.
          prefix: Stands before every line but messages.
          clock: Returns seconds.
        """
        self._stream = sys.stdout if stream is None else stream
        self._enabled, self._prefix, self._clock = enabled, prefix, clock
        self._rewrites = self._stream.isatty()
        self._interval = min(interval, 0.5) if self._rewrites else interval
        self._shown, self._held = -math.inf, ""
        self._open = False

    def update(self, line: str) -> None:
        """Show `line`: over the last one on a terminal, as a new line elsewhere."""
        if not self._enabled:
            return
        now = self._clock()
        if now - self._shown < self._interval:
            self._held = line
            return
        self._shown, self._held = now, ""
        line = self._prefix + line
        if self._rewrites:
            columns = os.get_terminal_size(self._stream.fileno()).columns or 80
            # A line that wraps can no longer be rewritten.
            self._stream.write("\r\x1b[K" + line[: columns - 1])
            self._open = True
        else:
            self._stream.write(line + "\n")
        self._stream.flush()

    def message(self, text: str) -> None:
        """Print a line that stays."""
        if not self._enabled:
            return
        self._stream.write(("\r\x1b[K" if self._open else "") + text + "\n")
        self._open = False
        self._stream.flush()

    def close(self) -> None:
        """Show a line that was held back, and end the rewritten one, leaving it to be read."""
        if self._held:
            self._shown = -math.inf
            self.update(self._held)
        if self._open:
            self._stream.write("\n")
            self._stream.flush()
        self._open = False
