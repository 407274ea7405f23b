"""Reading in grain's worker processes, which end with this one and fail with a sentence."""

import contextlib
from collections.abc import Iterator
from typing import Any

import grain

from instella_jax.runtime.workers import begin_worker, starting_workers, worker_error

_OPTION = "workers (--config.data.workers, or --workers)"


class Workers(grain.IterDataset):
    """A stream that is read and transformed in worker processes."""

    def __init__(self, stream: grain.IterDataset, count: int, ahead: int):
        """Divide a stream.

        Args:
          stream: of which grain gives each worker a slice.
          count: of the processes.
          ahead: items that each keeps ready.
        """
        options = grain.MultiprocessingOptions(num_workers=count, per_worker_buffer_size=ahead)
        self._stream = stream.mp_prefetch(options, worker_init_fn=begin_worker)
        super().__init__(self._stream)

    def __iter__(self) -> grain.DatasetIterator:
        """Prepare the processes; the first item starts them."""
        items = _WorkersIterator(iter(self._stream))
        # Makes what they share, for which there may be no room, before anything depends on it.
        items.get_state()
        return items


class _WorkersIterator(grain.DatasetIterator):
    def __init__(self, items: grain.DatasetIterator):
        super().__init__()
        self._items = items

    def __next__(self) -> Any:
        """Return the next item.

        Raises:
          UserError: a process was killed, or there is no room to hand items over.
        """
        with _plain_errors(), starting_workers():
            return next(self._items)

    def get_state(self) -> Any:
        """Return the position after the last item."""
        with _plain_errors(), starting_workers():
            return self._items.get_state()

    def set_state(self, state: Any) -> None:
        """Go to a position."""
        with _plain_errors(), starting_workers():
            self._items.set_state(state)

    def close(self) -> None:
        """End the processes."""
        self._items.close()
        super().close()


@contextlib.contextmanager
def _plain_errors() -> Iterator[None]:
    """Raise `UserError` in place of the errors of worker processes that ended."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        if told := worker_error(error, _OPTION):
            raise told from error
        raise
