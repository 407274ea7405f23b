"""A trace of some training steps, to look at with xprof or TensorBoard's profile plugin."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

# Calls before the trace: the first compiles, the second fills what is made on first use.
WARM_UP = 2


class StepTrace:
    """Records the calls of the compiled step that hold `steps` steps, once per run."""

    def __init__(self, folder: Path, steps: int, per_call: int, message: Callable[[str], None]):
        """Plan the trace.

        Args:
          folder: where it goes.
          steps: how many to record, rounded up to whole calls; 0 for no trace.
          per_call: steps in one call.
          message: is given the line that says where the trace is.

        Raises:
          UserError: the number of steps is negative.
        """
        # One process of several suffices: all compute the same program.
        self._calls = -(-steps // per_call) if jax.process_index() == 0 else 0
        self._folder, self._message = folder, message
        self._seen, self._open = 0, False

    @contextlib.contextmanager
    def call(self, step: int, state: Any) -> Iterator[None]:
        """Go around a call that begins at a step; `state` is what the call before returned."""
        if self._seen == WARM_UP + self._calls:
            self.close(state)
        if self._seen == WARM_UP and self._calls:
            jax.block_until_ready(state)
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # thousands of events of the loader's threads
            jax.profiler.start_trace(str(self._folder), profiler_options=options)
            self._open = True
        self._seen += 1
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            yield

    def close(self, state: Any) -> None:
        """End the trace, if it runs, once `state` is computed."""
        if self._open:
            self._open = False
            jax.block_until_ready(state)
            jax.profiler.stop_trace()
            self._message(f"profile: {self._folder}")
