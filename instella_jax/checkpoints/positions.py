"""The positions of data loaders, for another number of processes."""

from collections.abc import Sequence
from typing import Any


def share_state(states: Sequence[Any], index: int, count: int) -> Any:
    """Make of the loaders' positions of some processes that of one of another number.

    Args:
      states: of all processes that saved them, in order.
      index: of the process that goes on.
      count: processes that go on.
    """
    first = states[0]
    if isinstance(first, dict):
        return {
            key: _rows_of([state[key] for state in states], index, count)
            if key == "rows"
            else share_state([state[key] for state in states], index, count)
            for key in first
        }
    if isinstance(first, list):
        return [share_state(parts, index, count) for parts in zip(*states, strict=True)]
    return first


def _rows_of(parts: Sequence[list[int]], index: int, count: int) -> list[int]:
    whole = sum(parts, [])
    size = len(whole) // count
    return whole[index * size : (index + 1) * size]
