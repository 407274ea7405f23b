"""Positions of data loaders, divided anew among another number of processes or rows."""

from collections.abc import Sequence
from typing import Any


def rows_of(state: Any) -> int | None:
    """Return how many rows the position of a loader has, None where it has none."""
    parts = state.values() if isinstance(state, dict) else state if isinstance(state, list) else ()
    if isinstance(state, dict) and "rows" in state:
        return len(state["rows"])
    return next((found for part in parts if (found := rows_of(part)) is not None), None)


def share_state(states: Sequence[Any], index: int, count: int, rows: int | None = None) -> Any:
    """Return one process's loader position, given those that another number of processes saved.

    Args:
      states: of all processes that saved them, in order.
      index: of the process that goes on.
      count: processes that go on.
      rows: of each of these, None for as many in all as there were. Where they are others, all
        begin after the last sample that any row has read, so that none comes twice.
    """
    first = states[0]
    if isinstance(first, dict):
        return {
            key: _share_rows([state[key] for state in states], index, count, rows)
            if key == "rows"
            else share_state([state[key] for state in states], index, count, rows)
            for key in first
        }
    if isinstance(first, list):
        return [share_state(parts, index, count, rows) for parts in zip(*states, strict=True)]
    return first


def _share_rows(parts: Sequence[list[int]], index: int, count: int, rows: int | None) -> list[int]:
    whole = sum(parts, [])
    size = rows or len(whole) // count
    if size * count != len(whole):
        samples = max(whole) * len(whole)
        whole = [-(-samples // (size * count))] * (size * count)
    return whole[index * size : (index + 1) * size]
