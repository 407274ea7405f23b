"""Samples to batches.

Axes: G steps per call, B batch, L text length.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from instella_jax.errors import UserError


class TextEncoder(Protocol):
    """What the loader needs of a text tokenizer."""

    def encode(
        self, texts: list[str], /, max_length: int, pad_to: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return ids int32 [B, L] and mask bool [B, L], L = pad_to."""
        ...


class Collate:
    """Stacks arrays and lists everything else, with a leading group axis when `groups` is set."""

    def __init__(self, groups: int | None):
        self._groups = groups

    def __call__(self, samples: Sequence[Any]) -> dict[str, Any]:
        """Return the batch of the samples.

        Raises:
          UserError: their arrays differ in shape.
        """
        batch = {}
        for key, first in samples[0].items():
            values = [sample[key] for sample in samples]
            if isinstance(first, np.ndarray | np.generic | int | float):
                batch[key] = self._stack(key, values)
            elif self._groups is None:
                batch[key] = values
            else:
                size = len(values) // self._groups
                batch[key] = [values[i : i + size] for i in range(0, len(values), size)]
        return batch

    def _stack(self, key: str, values: list[Any]) -> np.ndarray:
        shapes = {np.shape(value) for value in values}
        if len(shapes) > 1:
            raise UserError(
                f"samples of one batch differ in the shape of {key!r} ({sorted(shapes)[:3]}); "
                "give the loader a transform that makes them the same size"
            )
        stacked = np.stack(values)
        if self._groups is None:
            return stacked
        return stacked.reshape(self._groups, -1, *stacked.shape[1:])


def add_ids(batch: dict[str, Any], tokenizer: TextEncoder, max_length: int) -> dict[str, Any]:
    """Return `batch` with "ids" and "mask" beside "text"."""
    text = batch["text"]
    grouped = isinstance(text[0], list)
    flat = [line for group in text for line in group] if grouped else list(text)
    ids, mask = tokenizer.encode(flat, max_length=max_length, pad_to=max_length)
    shape = (len(text), -1, max_length) if grouped else (len(text), max_length)
    return {
        **batch,
        "ids": np.asarray(ids, np.int32).reshape(shape),
        "mask": np.asarray(mask, bool).reshape(shape),
    }
