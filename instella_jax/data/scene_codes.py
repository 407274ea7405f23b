"""Precomputed codes of the first training scenes: training on them needs no image encoder.

Unlike a data set of codes (`data.codes`) they hold neither captions nor a held-out part: both are
those of the scenes.
"""

import functools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from instella_jax.data.scenes.source import EmojiScenes
from instella_jax.errors import UserError
from instella_jax.runtime.files import replacing

DEMO_FOLDER = Path(__file__).parents[1] / "assets" / "demo_codes"
_FILE = "codes.safetensors"


class CodedScenes:
    """Training scenes with precomputed codes, as a grain random-access data source.

    `source[i]` is {"code": uint8 [ceil(N K / 8)], packed, "text": str}.
    """

    def __init__(self, scenes: EmojiScenes, folder: Path):
        """Read the codes of `scenes[0]`, `scenes[1]` and so on."""
        from safetensors.numpy import load_file

        self._scenes, self._codes = scenes, load_file(folder / _FILE)["codes"]

    def __len__(self) -> int:
        """Return the number of scenes with a code."""
        return len(self._codes)

    def __repr__(self) -> str:
        """Name the scenes, which grain shows and stores to recognise the source."""
        return f"CodedScenes({len(self)} of {self._scenes!r})"

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Look up the code of a scene, and word its caption."""
        return {"code": self._codes[index], "text": self._scenes.caption(index)}


@functools.cache
def read_description(folder: Path) -> dict[str, str]:
    """Read what the codes of a folder are of.

    Raises:
      UserError: there are none.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(folder / _FILE, framework="numpy") as file:
            return file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"data.scenes.codes: cannot read {folder / _FILE} ({error}); give a folder that "
            "tools/encode_scenes.py made, or nothing, and each step renders and encodes its scenes"
        ) from None


def write_codes(
    folder: str | os.PathLike[str], packed: np.ndarray, description: Mapping[str, str]
) -> None:
    """Write codes uint8 [scenes, ceil(N K / 8)] of the scenes that the description is of."""
    from safetensors.numpy import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / _FILE) as scratch:
        save_file({"codes": packed}, scratch, metadata=dict(description))
        scratch.chmod(0o644)  # safetensors makes private files
