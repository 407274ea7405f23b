"""A folder of pictures: PNG files with their records, `metadata.jsonl`, and grids."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from instella_jax.errors import UserError
from instella_jax.reporting.pictures import save_grid, save_png
from instella_jax.sampling.records import as_texts


class Album:
    """Writes pictures as they come: PNG files, `metadata.jsonl`, and a grid every so often."""

    def __init__(self, out: Path):
        """Make the folder, or go on after the numbers that are there.

        Raises:
          UserError: the folder cannot be made.
        """
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _cannot_write(out, error) from None
        self._out = out
        self._first, self._done = next_number(out), 0
        self._sheet: list[tuple[np.ndarray, str]] = []
        self._grid = out

    def add(self, pictures: np.ndarray, records: Sequence[Mapping[str, Any]]) -> list[Path]:
        """Write the next pictures.

        Args:
          pictures: uint8 [n, height, width, 3].
          records: what each says of itself, see `records.make_record`.

        Returns:
          The n files.

        Raises:
          UserError: the folder cannot be written; what was written before stays.
        """
        paths = []
        try:
            with (self._out / "metadata.jsonl").open("a", encoding="utf-8") as lines:
                for picture, record in zip(pictures, records, strict=True):
                    if self._sheet and self._sheet[-1][0].shape != picture.shape:
                        self._write_grid()
                    name = self._write(picture, record)
                    lines.write(json.dumps({"file_name": name, **record}) + "\n")
                    paths.append(self._out / name)
                    self._sheet.append((picture, record["text"]))
                    if len(self._sheet) == pictures_in_a_grid(*picture.shape[:2]):
                        self._write_grid()
        except OSError as error:
            raise _cannot_write(self._out, error) from None
        return paths

    def close(self) -> Path:
        """Write the last grid and return its path."""
        try:
            if self._sheet:
                self._write_grid()
        except OSError as error:
            raise _cannot_write(self._out, error) from None
        return self._grid

    def _write(self, picture: np.ndarray, record: Mapping[str, Any]) -> str:
        """Write one PNG and return its name."""
        words = re.sub(r"[^a-z0-9]+", "-", record["text"].lower()).strip("-")[:60]
        name = f"{self._first + self._done:05d}-{words}-seed{record['seed']}.png"
        save_png(self._out / name, picture, as_texts(record))
        self._done += 1
        return name

    def _write_grid(self) -> None:
        """Write the grid of the pictures since the last one, with the number of its first."""
        start = self._done - len(self._sheet)
        self._grid = self._out / f"grid-{self._first + start:05d}.png"
        pictures, captions = zip(*self._sheet, strict=True)
        save_grid(self._grid, np.stack(pictures), captions)
        self._sheet = []


def pictures_in_a_grid(height: int, width: int) -> int:
    """Return how many pictures of a size are shown together: at most 64, and 64 megapixels."""
    return max(1, min(64, 64 * 2**20 // (height * width)))


def _cannot_write(out: Path, error: OSError) -> UserError:
    return UserError(f"cannot write pictures to {out} ({error.strerror})")


def next_number(out: Path) -> int:
    """Return one more than the greatest number of a picture in a folder, 0 for the first."""
    numbers = [int(m[1]) for p in out.iterdir() if (m := re.match(r"(?:grid-)?(\d{5,})", p.name))]
    return max(numbers, default=-1) + 1
