"""`--mode=sample`: prompts of a config -> PNG files and a grid."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from instella_jax.config import Config
from instella_jax.errors import UserError
from instella_jax.reporting.pictures import save_grid, save_png


class Album:
    """Writes pictures as they come: PNG files, `metadata.jsonl`, and a grid every so often."""

    def __init__(self, out: Path, captions: list[str], sample: Config, weights: dict[str, Any]):
        """Make the folder, or go on after the numbers that are there.

        Args:
          out: the folder.
          captions: prompt of each picture that will come, those of a prompt together.
          sample: the config's `sample` section, which `metadata.jsonl` repeats.
          weights: what `metadata.jsonl` says of the weights, see `load.Weights`.

        Raises:
          UserError: the folder cannot be made.
        """
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _cannot_write(out, error) from None
        self._out, self._captions, self._sample = out, captions, sample
        self._weights = weights
        self._first, self._done = next_number(out), 0
        self._sheet: list[np.ndarray] = []
        self._grid = out

    def add(self, pictures: np.ndarray) -> None:
        """Write the next pictures, uint8 [n, height, width, 3].

        Raises:
          UserError: the folder cannot be written; what was written before stays.
        """
        try:
            with (self._out / "metadata.jsonl").open("a", encoding="utf-8") as lines:
                for picture in pictures:
                    lines.write(json.dumps(self._write(picture)) + "\n")
                    self._sheet.append(picture)
                    if len(self._sheet) == pictures_in_a_grid(*picture.shape[:2]):
                        self._write_grid()
        except OSError as error:
            raise _cannot_write(self._out, error) from None

    def close(self) -> Path:
        """Write the last grid and return its path."""
        try:
            if self._sheet:
                self._write_grid()
        except OSError as error:
            raise _cannot_write(self._out, error) from None
        return self._grid

    def _write(self, picture: np.ndarray) -> dict[str, Any]:
        """Write one PNG and return its line of metadata."""
        caption = self._captions[self._done]
        seed = self._sample.seed + self._done % self._sample.images_per_prompt
        words = re.sub(r"[^a-z0-9]+", "-", caption.lower()).strip("-")[:60]
        name = f"{self._first + self._done:05d}-{words}-seed{seed}.png"
        save_png(self._out / name, picture)
        self._done += 1
        left_out = ("prompt", "prompts_file", "out")
        settings = {k: v for k, v in self._sample.items() if k not in left_out}
        return {
            "file_name": name,
            "text": caption,
            **settings,
            "seed": seed,
            "weights": self._weights,
        }

    def _write_grid(self) -> None:
        """Write the grid of the pictures since the last one, with the number of its first."""
        start = self._done - len(self._sheet)
        self._grid = self._out / f"grid-{self._first + start:05d}.png"
        save_grid(self._grid, np.stack(self._sheet), self._captions[start : self._done])
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
