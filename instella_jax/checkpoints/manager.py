"""Checkpoints of a run.

A checkpoint holds the train state, the position in the data and nothing else; `config.json` of the
workdir says what run it belongs to.
"""

import contextlib
import dataclasses
import itertools
import json
import logging
import math
import os
import re
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers as policies

from instella_jax.checkpoints.integrity import restore_newest, write_manifest
from instella_jax.checkpoints.positions import rows_of, share_state
from instella_jax.errors import UserError, disk_remedy

logger = logging.getLogger(__name__)

# What orbax writes as it commits, after the manifest; nothing that is restored.
_COMMIT_FILES = frozenset({"_CHECKPOINT_METADATA", "commit_success.txt"})


# The hook is what orbax is asked for by class; its options that replace that only choose between
# its own classes, none of which can add a file just before the name counts.
class _HashedPath(ocp.path.atomicity.AtomicRenameTemporaryPath):
    """A checkpoint being written: has its manifest before it gets the name that counts."""

    async def finalize(self) -> None:
        write_manifest(Path(self.get()), leave_out=_COMMIT_FILES)
        await super().finalize()


def _not_raised_elsewhere(record: logging.LogRecord) -> bool:
    """Leave out of a log the errors that are raised as well: they are told in a sentence."""
    orphan = "never retrieved" in record.getMessage()
    return not (record.exc_info and (orphan or "orbax" in record.pathname))


def silence_aborted_writes() -> None:
    """Keep this process from printing what becomes of the other writes of a save that failed.

    Some report to an event loop that the error closed, some had not begun and warn when they are
    collected. Only the error itself, which is raised, tells anything.
    """
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    before = sys.unraisablehook

    def hook(args: Any) -> None:
        if "Event loop is closed" not in str(args.exc_value):
            before(args)

    sys.unraisablehook = hook


@dataclasses.dataclass(frozen=True)
class Keep:
    """Which checkpoints stay; one of these reasons is enough.

    Attributes:
      newest: so many of the newest.
      every: those whose step is a multiple of this; 0 for none.
      minutes: the first one, and each that is at least so much later than the last one that stays
        for this reason; 0 for none.
      best: the best one by this held-out metric; "" for none.
    """

    newest: int = 3
    every: int = 0
    minutes: float = 0.0
    best: str = ""

    def rank(self, metrics: Mapping[str, float]) -> float:
        """Return how good a checkpoint is: of losses the lowest is best, of others the highest.

        Without the metric, or where it is no number, it is worse than all others.
        """
        value = metrics.get(self.best, math.nan)
        return -math.inf if math.isnan(value) else -value if "loss" in self.best else value

    def policy(self) -> policies.PreservationPolicy:
        """Return the policy in orbax's terms."""
        reasons: list[policies.PreservationPolicy] = [policies.LatestN(self.newest)]
        if self.every:
            reasons.append(policies.EveryNSteps(self.every))
        if self.minutes:
            reasons.append(policies.EveryNSeconds(round(60 * self.minutes)))
        if self.best:
            best = policies.BestN(
                get_metric_fn=self.rank, n=1, keep_checkpoints_without_metrics=False
            )
            reasons.append(best)
        return policies.AnyPreservationPolicy(reasons)


class Checkpoints:
    """The checkpoints of a workdir, written in the background, each with a manifest of hashes."""

    def __init__(self, workdir: str | os.PathLike[str], keep: Keep = Keep()):
        """Open `workdir/checkpoints`, made if needed."""
        self._folder = Path(workdir).absolute() / "checkpoints"
        self._saving = self._failed = False
        self._error: BaseException | None = None
        logging.getLogger("absl").addFilter(self._notice)
        with self._raise_user_error():
            self._manager = ocp.CheckpointManager(
                self._folder,
                options=ocp.CheckpointManagerOptions(
                    preservation_policy=keep.policy(),
                    # With it, metrics are written.
                    best_fn=keep.rank if keep.best else None,
                    create=True,
                    temporary_path_class=_HashedPath,
                ),
            )

    def save(
        self, state: Any, data: Any, step: int, metrics: Mapping[str, float] | None = None
    ) -> None:
        """Save the state and the loader's position after `step` steps, unless that is there.

        Args:
          state: of the training.
          data: the loader.
          step: number of steps done.
          metrics: held-out metrics of this state, if it was evaluated.

        Raises:
          UserError: this one or the one before it cannot be written.
        """
        import grain

        if step in self._manager.all_steps():
            return
        with self._raise_user_error():
            self._wait_for_all()
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state),
                    data=grain.checkpoint.CheckpointSave(data),
                ),
                metrics=dict(metrics or {}),
            )
        self._saving = True

    def check(self) -> None:
        """Notice, without waiting, whether what was being saved could not be written.

        Raises:
          UserError: it could not.
        """
        if self._error or (self._saving and not self._manager.is_saving_in_progress()):
            self.wait()

    def restore(self, like: Any, data: Any) -> Any:
        """Restore the newest checkpoint that is whole, and set damaged newer ones aside.

        Args:
          like: a state, or its shapes, with the shardings wanted.
          data: the loader, set to the position that belongs to the state.

        Returns:
          The state, or None where there is no checkpoint.

        Raises:
          UserError: the checkpoint does not fit the state, or none is whole.
        """
        like = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like
        )
        steps = self._manager.all_steps()
        found = restore_newest(
            self._folder, steps, lambda step: self._restore_step(step, like, data)
        )
        if found is None:
            return None
        good, state = found
        self._set_aside([step for step in steps if step > good])
        return state

    def _restore_step(self, step: int, like: Any, data: Any) -> Any:
        import grain

        items: dict[str, Any] = dict(state=ocp.args.StandardRestore(like))
        position = self._position_of_other_rows(step, rows_of(data.get_state()))
        if position is None:
            items["data"] = grain.checkpoint.CheckpointRestore(data)
        restored = self._manager.restore(step, args=ocp.args.Composite(**items))
        if position is not None:
            data.set_state(position)
        return restored["state"]

    def _set_aside(self, steps: Sequence[int]) -> None:
        """Rename damaged checkpoints to `<step>.damaged`, where they are in nobody's way."""
        if not steps:
            return
        if jax.process_index() == 0:
            for step in steps:
                names = (f"{step}.damaged{n or ''}" for n in itertools.count())
                free = next(n for n in names if not (self._folder / n).exists())
                os.rename(self._folder / str(step), self._folder / free)
                logger.warning(
                    "checkpoint %d is set aside as %s: remove that when you need it no more",
                    step, self._folder / free,
                )  # fmt: skip
        multihost_utils.sync_global_devices("damaged checkpoints are set aside")
        self._manager.reload()

    def _position_of_other_rows(self, step: int, rows: int | None) -> Any:
        """Return the loader's position where other processes, or another batch size, made it.

        Args:
          step: of the checkpoint.
          rows: of a batch that this process reads now.
        """
        index, now = jax.process_index(), jax.process_count()
        folder = self._folder / str(step) / "data"
        saved = sorted(folder.glob("process_0-of-*.json"))
        if not saved:
            return None
        before = int(saved[0].stem.rpartition("-")[2])
        names = [f"process_{number}-of-{before}.json" for number in range(before)]
        states = [json.loads((folder / name).read_text(encoding="utf-8")) for name in names]
        if before == now and rows == rows_of(states[0]):
            return None
        if before != now:
            logger.warning("checkpoint %d was saved by %d process(es), %d go on", step, before, now)
        return share_state(states, index, now, rows)

    def wait(self) -> None:
        """Wait until everything is on disk.

        Raises:
          UserError: it cannot be written.
        """
        with self._raise_user_error():
            self._wait_for_all()
            self._manager.wait_until_finished()
        self._saving = False

    def _notice(self, record: logging.LogRecord) -> bool:
        """See in the log what a background thread of this process could not write."""
        if record.exc_info and record.threadName == "async_save":
            self._error = record.exc_info[1]
        return _not_raised_elsewhere(record)

    def _wait_for_all(self) -> None:
        """Wait for what is being saved, unless this process could not write its part.

        The others would wait ten minutes for that one, and storage waits for them before it raises.
        """
        while jax.process_count() > 1 and self._manager.is_saving_in_progress():
            if self._error is not None:
                raise self._error
            time.sleep(0.02)

    def close(self) -> None:
        """Wait and close.

        Raises:
          UserError: what was being saved cannot be written, and that was not told before.
        """
        if self._failed and jax.process_count() > 1:
            return  # this process ends, and storage would wait for the others
        # What could not be written is told once.
        with contextlib.suppress(Exception) if self._failed else self._raise_user_error():
            self._manager.close()

    @contextlib.contextmanager
    def _raise_user_error(self) -> Iterator[None]:
        """Raise a `UserError` that says what the file system reported."""
        try:
            yield
        except (OSError, ValueError, RuntimeError) as error:
            self._failed, self._saving = True, False
            logging.getLogger("asyncio").addFilter(_not_raised_elsewhere)
            cause = _of_system(error)
            remedy = cause and disk_remedy(cause) or "see that the folder can be written"
            reason = cause.strerror if cause else " ".join(str(error).split())[:200]
            raise UserError(
                f"a checkpoint cannot be written to {self._folder} ({reason}); "
                f"those before it stay: {remedy} and run the same command again"
            ) from error


def _of_system(error: Exception) -> OSError | None:
    """Return what the operating system said, where that is known."""
    number = re.search(r"os_error_code='?(\d+)", str(error))
    if number:
        return OSError(int(number[1]), os.strerror(int(number[1])))
    return error if isinstance(error, OSError) and error.strerror else None
