"""Which samples of an endless stream each process of a run reads.

Axes: B samples of one process in a batch.
"""

from typing import Any

import grain


class Blocks(grain.MapDataset):
    """Of every `count` consecutive blocks of `size` samples, number `index`.

    Processes that each make batches of `size` samples of their blocks make together the batches
    that one process would make of the whole stream, in the same order.
    """

    def __init__(self, parent: grain.MapDataset, size: int, index: int, count: int):
        """Takes a stream apart.

        Args:
          parent: the whole stream; what does not fill a block for everyone is left out.
          size: B.
          index: of this process, in [0, count).
          count: processes.
        """
        super().__init__(parent)
        self._size, self._index, self._count = size, index, count

    def __len__(self) -> int:
        """Returns the number of samples of this process."""
        return len(self._parent) // (self._size * self._count) * self._size

    def __getitem__(self, index: Any) -> Any:
        """Returns a sample, None where it cannot be used."""
        if isinstance(index, slice):
            return self.slice(index)
        return self._parent[self._place(index)]

    def _place(self, index: int) -> int:
        block, row = divmod(index, self._size)
        return (block * self._count + self._index) * self._size + row


def rescale_state(state: Any, old: int, new: int) -> Any:
    """Translates a loader's position to another number of processes that share the batches.

    Exact where no sample had to be left out; else some samples come again or are missed.

    Args:
      state: of a loader that is one of `old`.
      old: processes that the state was saved by.
      new: processes that go on.
    """
    if isinstance(state, dict):
        return {
            key: value * old // new if key == "next_index" else rescale_state(value, old, new)
            for key, value in state.items()
        }
    if isinstance(state, list):
        return [rescale_state(value, old, new) for value in state]
    return state
