"""How the processes of a run end together, whichever of them fails.

One that fails leaves the others waiting in a collective for ever, and waits itself at jax's
barrier at exit for them. So it notes why in the key-value store of jax.distributed, which all look
at, and then all end.
"""

import contextlib
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from typing import Any, NoReturn

from instella_jax.errors import command_line

_NOTE = "instella_jax/ended"
# How often the others look, and how long one that fails gives them to.
_SECONDS = 1.0
_PATIENCE = 10.0


@contextlib.contextmanager
def ending_together() -> Iterator[None]:
    """Ends this process at an error, telling the others, or when another has told of one.

    With one process, errors go through.
    """
    # The only store that all processes share before and after any collective.
    from jax._src.distributed import global_state

    client = global_state.client
    if client is None:
        yield
        return
    others = _Others(client, global_state.process_id)
    try:
        with command_line():
            yield
    except SystemExit as error:
        others.tell_and_end(error.code, str(error.__context__ or "it was told to stop"))
    except BaseException as error:
        traceback.print_exc()
        others.tell_and_end(1, " ".join(f"{type(error).__name__}: {error}".split())[:300])
    others.forget()


class _Others:
    """The other processes, as a thread hears of them."""

    def __init__(self, client: Any, number: int):
        self._client, self._number = client, number
        self._over = threading.Event()
        self._ending = threading.Lock()
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def forget(self) -> None:
        """Listens no more."""
        self._over.set()
        self._thread.join()

    def tell_and_end(self, status: Any, reason: str) -> NoReturn:
        """Tells the others why this process ends, waits a little until they know, and ends it."""
        self._ending.acquire()  # held to the end: a process tells one reason
        with contextlib.suppress(Exception):  # another was faster
            self._client.key_value_set(_NOTE, f"process {self._number} of this run ended: {reason}")
        self._end(status if isinstance(status, int) else 1)

    def _listen(self) -> None:
        while not self._over.wait(_SECONDS):
            try:
                note = self._client.key_value_try_get(_NOTE)
            except Exception:  # nothing is noted, or the store is gone, of which jax tells
                continue
            self._ending.acquire()
            print(f"error: {note}", file=sys.stderr)
            self._end(2)

    def _end(self, status: int) -> NoReturn:
        with contextlib.suppress(Exception):  # a process that was killed does not come
            self._client.wait_at_barrier(_NOTE, int(1000 * _PATIENCE))
        sys.stdout.flush()
        sys.stderr.flush()
        if self._number == 0:
            time.sleep(0.5)  # it keeps the store: the others should be gone before
        # Not sys.exit, at which jax would wait for the others once more.
        os._exit(status)
