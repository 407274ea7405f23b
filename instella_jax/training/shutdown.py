"""Being told to stop, by a scheduler or at the keyboard."""

import contextlib
import signal
from collections.abc import Iterator
from typing import Any


class StopRequest:
    """Turns SIGTERM and the first Ctrl-C into a request that the loop reads between steps."""

    def __init__(self) -> None:
        self.requested = False

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Listen as long as the context lasts."""

        def ask(signum: int, _: Any) -> None:
            if self.requested and signum == signal.SIGINT:
                raise KeyboardInterrupt
            self.requested = True

        old = {s: signal.signal(s, ask) for s in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in old.items():
                # None is a handler that Python did not set, such as that of jax.distributed.
                signal.signal(number, signal.SIG_DFL if handler is None else handler)
