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

import jax

from instella_jax.errors import UserError, disk_error

_NOTE = "instella_jax/ended"
# How often the others look, and how long one that fails gives them to.
_SECONDS = 1.0
_PATIENCE = 10.0
# A process may have more to do than the others: no reason to end it.
_FOREVER = 30 * 24 * 3600.0

_LOST = (
    "another process of this run is gone, killed or out of reach; run the same command again, "
    "which goes on from the newest checkpoint"
)


@contextlib.contextmanager
def end_together() -> Iterator[None]:
    """End this process at an error, telling the others, or when another has told of one.

    With one process, errors go through.
    """
    client, number = _store()
    if client is None:
        yield
        return
    others = _Others(client, number)
    try:
        yield
        wait_for_all("done")
        others.forget()
    except UserError as error:
        others.announce(str(error), f"error: {error}")
        others.end(2)
    except OSError as error:
        if (told := disk_error(error)) is None:
            others.fail(error)
        others.announce(str(told), f"error: {told}")
        others.end(2)
    except (KeyboardInterrupt, SystemExit) as error:
        others.announce("it was told to stop")
        code = error.code if isinstance(error, SystemExit) else 130
        others.end(code if isinstance(code, int) else 1)
    except BaseException as error:
        others.fail(error)


def wait_for_all(name: str) -> None:
    """Wait until all processes have come to this place, however long one of them takes.

    Args:
      name: of the place; each is come to once.
    """
    client, _ = _store()
    if client is not None:
        client.wait_at_barrier(f"instella_jax/{name}", int(1000 * _FOREVER))


def _store() -> tuple[Any, int]:
    """Return the client of the only store that all processes share before and after any collective,
    None where this process is alone, and the number of this process."""
    from jax._src.distributed import global_state

    return global_state.client, global_state.process_id


class _Others:
    """The other processes, as a thread hears of them."""

    def __init__(self, client: Any, number: int):
        self._client, self._number = client, number
        self._over = threading.Event()
        self._ending = threading.Lock()
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def forget(self) -> None:
        """Listen no more."""
        self._over.set()
        self._thread.join()

    def announce(self, reason: str, line: str = "") -> bool:
        """Tell the others why this process ends; return whether all have heard it in time.

        Prints a line first, if given, unless another process has told of its end by now.
        """
        self._ending.acquire()  # held to the end: a process tells one reason
        if line:
            print(line, file=sys.stderr)
        with contextlib.suppress(Exception):  # another was faster
            self._client.key_value_set(_NOTE, f"process {self._number} of this run ended: {reason}")
        return self._meet()

    def fail(self, error: BaseException) -> NoReturn:
        """End this process at an error that nobody expected; called where it is handled."""
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        if self.announce(reason) or not isinstance(error, jax.errors.JaxRuntimeError):
            traceback.print_exc()
        else:
            print(f"error: {_LOST} ({reason})", file=sys.stderr)
        self.end(1)

    def end(self, status: int) -> NoReturn:
        """End this process, which has told of it or heard of another."""
        sys.stdout.flush()
        sys.stderr.flush()
        if self._number == 0:
            time.sleep(0.5)  # it keeps the store: the others should be gone before
        # Not sys.exit, at which jax would wait for the others once more.
        os._exit(status)

    def _listen(self) -> None:
        while not self._over.wait(_SECONDS):
            try:
                note = self._client.key_value_try_get(_NOTE)
            except Exception:  # nothing is noted, or the store is gone, of which jax tells
                continue
            self._ending.acquire()
            print(f"error: {note}", file=sys.stderr)
            self._meet()
            self.end(2)

    def _meet(self) -> bool:
        try:
            self._client.wait_at_barrier(_NOTE, int(1000 * _PATIENCE))
        except Exception:  # a process that was killed does not come
            return False
        return True
