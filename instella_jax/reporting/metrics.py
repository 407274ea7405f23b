"""The metrics files of a run.

Nothing here touches the device: callers pass numbers that they have fetched.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from instella_jax.reporting.event_files import EventFile
from instella_jax.runtime.files import write_bytes

logger = logging.getLogger(__name__)


class MetricsWriter:
    """Writes scalars to `workdir/metrics.jsonl`, and with images to `workdir/tensorboard`.

    A line is one JSON object: {"step": 100, "train/loss": 0.31, ...}; a value that is not finite
    is null there. Only one process of a run should be `enabled`; in the others every method does
    nothing.
    """

    def __init__(
        self,
        workdir: str | os.PathLike[str],
        *,
        start_step: int = 0,
        enabled: bool = True,
    ):
        """Open the files for appending.

        Args:
          workdir: Made if it is not there.
          start_step: The step a resumed run continues from. What a killed run wrote of later
            steps is removed, since those steps come again.
          enabled: False in every process but the first.
        """
        self._file: TextIO | None = None
        self._events: EventFile | None = None
        self._known: set[tuple[int, str]] = set()
        if not enabled:
            return
        path = Path(workdir) / "metrics.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = _drop_after(path, start_step)
        self._known = {(row["step"], name) for row in rows for name in row}
        self._file = path.open("a", encoding="utf-8")
        self._events = EventFile(
            path.parent / "tensorboard", purge_step=start_step + 1 if start_step else None
        )

    def scalars(self, step: int, values: Mapping[str, Any], prefix: str = "") -> None:
        """Write numbers (Python, numpy or fetched jax scalars) under `prefix/name`."""
        if self._file is None:
            return
        named = {f"{prefix}/{k}" if prefix else k: float(v) for k, v in values.items()}
        plain = {name: v if math.isfinite(v) else None for name, v in named.items()}
        self._file.write(json.dumps({"step": int(step), **plain}, allow_nan=False) + "\n")
        self._file.flush()
        if self._events is not None:
            self._events.scalars(int(step), named)

    def changes(self, step: int, changed: Mapping[str, tuple[Any, Any]]) -> None:
        """Record what differs from a step on: a pair [old, new] for each name."""
        if self._file is None or not changed:
            return
        pairs = {name: list(pair) for name, pair in changed.items()}
        self._file.write(json.dumps({"step": int(step), "changed": pairs}) + "\n")
        self._file.flush()

    def has(self, step: int, name: str) -> bool:
        """Return whether `metrics.jsonl` had a value of this name and step as it was opened."""
        return (int(step), name) in self._known

    def image(self, step: int, name: str, picture: np.ndarray) -> None:
        """Write a picture, uint8 [H, W, 3], to TensorBoard."""
        if self._events is not None:
            self._events.image(int(step), name, picture)

    def close(self) -> None:
        """Flush and close; writing afterwards does nothing."""
        file, events = self._file, self._events
        self._file = self._events = None
        if events is not None:
            events.close()
        if file is not None:
            file.close()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_metrics(workdir: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Return the lines of `workdir/metrics.jsonl`; [] without one. A cut last line is left out."""
    path = Path(workdir) / "metrics.jsonl"
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            logger.warning("%s has a line that is not JSON; left out", path)
    return rows


def _drop_after(path: Path, step: int) -> list[dict[str, Any]]:
    """Keep only the whole lines of steps up to `step`, and return them."""
    if not path.exists():
        return []
    rows = [row for row in read_metrics(path.parent) if row["step"] <= step]
    kept = "".join(json.dumps(row) + "\n" for row in rows)
    if kept != path.read_text(encoding="utf-8"):
        write_bytes(path, kept.encode())
    return rows
