"""Long work on many files that may be killed at any time and run again: what is done stays.

The work is cut into numbered units, each of which makes at most one shard. A unit is done when its
`NNNNN.json` is there; that file is put in place after the shard, and both in one piece. A unit that
was interrupted is done anew under the same names, so nothing is there twice and nothing is missing.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from instella_jax.data.shards import DATASET_FILE, Shard, shard_writer, write_dataset_file
from instella_jax.errors import UserError
from instella_jax.runtime.files import Locked, locked, write_json

logger = logging.getLogger(__name__)

_PLAN, _SHARDS = "plan.json", "shards"


def parse_part(text: str) -> tuple[int, int]:
    """Read "I/N", this process's part of the work, I in [0, N).

    Raises:
      UserError: it is something else.
    """
    index, _, count = text.partition("/")
    if not (index.isdigit() and count.isdigit() and int(index) < int(count)):
        raise UserError(f"part is {text!r}: expected I/N with I from 0 to N-1, for example 0/8")
    return int(index), int(count)


class Job:
    """The output folder of such work."""

    def __init__(self, out: str | os.PathLike[str], plan: Mapping[str, Any], units: Sequence[str]):
        """Begin the work in a folder, or go on with it.

        Args:
          out: the folder; made if it is not there.
          plan: what the result depends on, as JSON; must be the same when going on with a folder
            in which there is a shard.
          units: names of the units, in order.

        Raises:
          UserError: the folder holds something else, or cannot be written.
        """
        self.folder, self.units = Path(out).expanduser(), list(units)
        whole = json.loads(json.dumps({**plan, "units": self.units}))
        path = self.folder / _PLAN
        try:
            (self.folder / _SHARDS).mkdir(parents=True, exist_ok=True)
            if path.exists():
                if changed := _changes(path, whole):
                    self._begin_anew(changed)
                    write_json(path, whole)
                return
            # Another part of the same work may have written its plan by now.
            others = sorted({p.name for p in self.folder.iterdir()} - {_SHARDS, _PLAN})
            others = [name for name in others if not name.startswith(".")]
            if others:
                raise UserError(f"{self.folder} is not empty ({others[0]}); choose another folder")
            write_json(path, whole)
        except OSError as error:
            raise UserError(f"{self.folder} cannot be written ({error.strerror})") from None

    def _begin_anew(self, changed: list[str]) -> None:
        """Clear a folder in which no shard was made.

        Raises:
          UserError: there is one, or another process is at it.
        """
        folder = self.folder / _SHARDS
        if any(folder.glob("*.arrayrecord")):
            names = ", ".join("input" if name == "source" else name for name in changed)
            raise UserError(
                f"{self.folder} was begun with other {names}; give the same input and options to "
                "go on, or choose another folder"
            )
        with contextlib.ExitStack() as stack:
            for lock in self.folder.glob(".lock-*"):
                stack.enter_context(self._locked(lock))
            self.dataset_file.unlink(missing_ok=True)
            for path in (*folder.glob("[0-9]*.json"), *folder.glob(".[0-9]*")):
                path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _locked(self, path: Path) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(locked(path))
            except Locked as holder:
                who = f" ({holder})" if str(holder) else ""
                raise UserError(
                    f"another process is writing {self.folder}{who}; wait for it, or end it"
                ) from None
            yield

    @contextlib.contextmanager
    def claim(self, part: tuple[int, int]) -> Iterator[list[int]]:
        """Lock a part of the work, remove a killed run's leftovers, and return what is left to do.

        Args:
          part: (I, N): the units whose number is I modulo N.

        Yields:
          The numbers of the units to be done.

        Raises:
          UserError: another process is at it.
        """
        index, count = part
        own = range(index, len(self.units), count)
        with self._locked(self.folder / f".lock-{index}-{count}"):
            for path in (self.folder / _SHARDS).glob(".*"):
                number = path.name[1:].split(".")[0]
                if number.isdigit() and int(number) in own:
                    path.unlink(missing_ok=True)
            yield [number for number in own if self.result(number) is None]

    def result(self, number: int) -> dict[str, Any] | None:
        """Return the recorded result of a unit, None if it is not done."""
        try:
            return json.loads(self._path(number, "json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except ValueError:
            logger.warning("%s is damaged: the unit is done again", self._path(number, "json"))
            return None

    def writer(self, number: int) -> contextlib.AbstractContextManager[Any]:
        """Open the shard of a unit; see `shards.shard_writer`."""
        path = self._path(number, "arrayrecord")
        # Hosts may share the folder: process numbers alone could coincide.
        scratch = f".{number:05d}.{socket.gethostname()}.{os.getpid()}"
        return shard_writer(path, path.with_name(scratch))

    def finish(self, number: int, records: int, result: Mapping[str, Any]) -> None:
        """Record that a unit is done, its shard being in place."""
        path = self._path(number, "arrayrecord")
        shard = None
        if records:
            size = path.stat().st_size
            shard = {"file": f"{_SHARDS}/{path.name}", "records": records, "bytes": size}
        write_json(
            self._path(number, "json"), {**result, "unit": self.units[number], "shard": shard}
        )

    def results(self) -> list[dict[str, Any]] | None:
        """Return the recorded results of all units of all parts, None while some are not done."""
        results = [self.result(number) for number in range(len(self.units))]
        done = [result for result in results if result is not None]
        return done if len(done) == len(results) else None

    def complete(
        self, content: str, results: Sequence[Mapping[str, Any]], details: Mapping[str, Any]
    ) -> None:
        """Write `dataset.json` of the results of all units."""
        shards = [Shard(**result["shard"]) for result in results if result["shard"]]
        write_dataset_file(self.folder, content, shards, details)

    @property
    def dataset_file(self) -> Path:
        """Path of `dataset.json`."""
        return self.folder / DATASET_FILE

    def _path(self, number: int, suffix: str) -> Path:
        return self.folder / _SHARDS / f"{number:05d}.{suffix}"


def _changes(path: Path, plan: dict[str, Any]) -> list[str]:
    """Return the keys in which a plan differs from a file."""
    try:
        begun = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise UserError(f"{path} is damaged; choose another folder") from None
    return [key for key in plan if not isinstance(begun, dict) or begun.get(key) != plan[key]]
