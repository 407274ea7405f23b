"""Checkpoints of a run: the only user of orbax.

A checkpoint holds the train state, the position in the data and nothing else; `config.json` of the
workdir says what run it belongs to.
"""

import contextlib
import errno
import itertools
import json
import logging
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import traverse_util
from jax.experimental import multihost_utils

from instella_jax.config import Config
from instella_jax.errors import UserError
from instella_jax.manifest import MANIFEST, find_damage, write_manifest
from instella_jax.train_state import TrainState

logger = logging.getLogger(__name__)

# What may change between the runs of one workdir: how long, how often, where, what is drawn.
_FREE = ("train.steps", "train.log_every", "train.eval_every", "train.save_every",
         "train.image_every", "train.keep", "train.max_skipped", "mesh", "sample", "eval", "run",
         "data.workers", "plan", "profile", "init_from", "shipped")  # fmt: skip


# What orbax writes as it commits, after the manifest; nothing that is restored.
_COMMIT_FILES = frozenset({"_CHECKPOINT_METADATA", "commit_success.txt"})


class _HashedPath(ocp.path.atomicity.AtomicRenameTemporaryPath):
    """A checkpoint being written: has its manifest before it gets the name that counts."""

    async def finalize(self) -> None:
        write_manifest(Path(self.get()), leave_out=_COMMIT_FILES)
        await super().finalize()


def _told_anyway(record: logging.LogRecord) -> bool:
    """Leaves out of a log the errors that are raised as well: they are told in a sentence."""
    orphan = "never retrieved" in record.getMessage()
    return not (record.exc_info and (orphan or "orbax" in record.pathname))


def hush_closed_loops() -> None:
    """Keeps this process from printing what storage says to an event loop that an error closed.

    Only the error itself, which is raised, tells anything.
    """
    before = sys.unraisablehook

    def hook(args: Any) -> None:
        if "Event loop is closed" not in str(args.exc_value):
            before(args)

    sys.unraisablehook = hook


class Checkpoints:
    """The checkpoints of a workdir, written in the background, each with a manifest of hashes."""

    def __init__(self, workdir: str | os.PathLike[str], keep: int = 3):
        """Opens `workdir/checkpoints`, made if needed; at most `keep` checkpoints stay."""
        self._folder = Path(workdir).absolute() / "checkpoints"
        self._saving = self._failed = False
        logging.getLogger("absl").addFilter(_told_anyway)
        with self._told():
            self._manager = ocp.CheckpointManager(
                self._folder,
                options=ocp.CheckpointManagerOptions(
                    max_to_keep=keep, create=True, temporary_path_class=_HashedPath
                ),
                item_names=("state", "data"),
            )

    def save(self, state: TrainState, data: Any, step: int) -> None:
        """Saves the state and the loader's position after `step` steps, unless that is there.

        Raises:
          UserError: this one or the one before it cannot be written.
        """
        import grain

        if step in self._manager.all_steps():
            return
        with self._told():
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state),
                    data=grain.checkpoint.CheckpointSave(data),
                ),
            )
        self._saving = True

    def check(self) -> None:
        """Notices, without waiting, whether what was being saved could not be written.

        Raises:
          UserError: it could not.
        """
        if self._saving and not self._manager.is_saving_in_progress():
            self.wait()

    def restore(self, like: TrainState, data: Any) -> TrainState | None:
        """Restores the newest checkpoint that is whole, and sets damaged newer ones aside.

        Args:
          like: a state, or a tree of ShapeDtypeStructs with the shardings wanted.
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
        found = _restore_newest(
            self._folder, steps, lambda step: self._restore_step(step, like, data)
        )
        if found is None:
            return None
        good, state = found
        self._set_aside([step for step in steps if step > good])
        return state

    def _restore_step(self, step: int, like: Any, data: Any) -> TrainState:
        import grain

        items: dict[str, Any] = dict(state=ocp.args.StandardRestore(like))
        position = self._position_of_other_processes(step)
        if position is None:
            items["data"] = grain.checkpoint.CheckpointRestore(data)
        restored = self._manager.restore(step, args=ocp.args.Composite(**items))
        if position is not None:
            data.set_state(position)
        return restored["state"]

    def _set_aside(self, steps: Sequence[int]) -> None:
        """Renames damaged checkpoints to `<step>.damaged`, where they are in nobody's way."""
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

    def _position_of_other_processes(self, step: int) -> Any:
        """Returns the loader's position where as many processes as now did not save it."""
        from instella_jax.data.blocks import rescale_state

        index, now = jax.process_index(), jax.process_count()
        folder = self._folder / str(step) / "data"
        saved = sorted(folder.glob("process_0-of-*.json"))
        if not saved or (folder / f"process_{index}-of-{now}.json").exists():
            return None
        before = int(saved[0].stem.rpartition("-")[2])
        logger.warning(
            "checkpoint %d was saved by %d process(es), %d go on: samples that could not be used "
            "may shift the data a little",
            step, before, now,
        )  # fmt: skip
        return rescale_state(json.loads(saved[0].read_text(encoding="utf-8")), before, now)

    def wait(self) -> None:
        """Waits until everything is on disk.

        Raises:
          UserError: it cannot be written.
        """
        with self._told():
            self._manager.wait_until_finished()
        self._saving = False

    def close(self) -> None:
        """Waits and closes.

        Raises:
          UserError: what was being saved cannot be written, and that was not told before.
        """
        # What could not be written is told once.
        with contextlib.suppress(Exception) if self._failed else self._told():
            self._manager.close()

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """Makes one sentence of what the file system says."""
        try:
            yield
        except (OSError, ValueError, RuntimeError) as error:
            self._failed, self._saving = True, False
            logging.getLogger("asyncio").addFilter(_told_anyway)
            raise UserError(
                f"a checkpoint cannot be written to {self._folder} ({_reason(error)}); "
                "those before it stay: make room there and run the same command again"
            ) from error


def _reason(error: Exception) -> str:
    """Returns what the operating system said, where that is known."""
    number = re.search(r"os_error_code='?(\d+)", str(error))
    if number:
        return os.strerror(int(number[1]))
    return getattr(error, "strerror", None) or " ".join(str(error).split())[:200]


def _state_of(folder: Path) -> tuple[bool, str | None]:
    """Returns whether a checkpoint has a manifest, and its damage; alike in all processes."""
    known, fault = True, None
    if jax.process_index() == 0:
        try:
            fault = find_damage(folder)
        except OSError:
            known = False
    known, whole = (
        bool(x)
        for x in multihost_utils.broadcast_one_to_all(np.array([known, fault is None], np.int32))
    )
    return known, None if whole else fault or "the first process says how"


def _restore_newest(
    folder: Path, steps: Iterable[int], restore: Callable[[int], Any]
) -> tuple[int, Any] | None:
    """Restores the newest whole one of several checkpoints, and tells of the ones left out.

    One without a manifest, which is from before there were any or lost it, has to restore.

    Args:
      folder: of the checkpoints.
      steps: that are there.
      restore: restores a step; an error is told as damage or, of a whole one, as a misfit.

    Returns:
      The step and what `restore` returned; None where there are no steps.

    Raises:
      UserError: a whole one does not fit, or none is whole.
    """
    faults = []
    for step in sorted(steps, reverse=True):
        known, fault = _state_of(folder / str(step))
        if fault is None:
            try:
                restored = restore(step)
            except (ValueError, KeyError, OSError) as error:
                line = " ".join(str(error).split())[:300]
                if known:
                    raise UserError(
                        f"checkpoint {step} of {folder} is whole but does not fit this run: "
                        f"{line}; use the config and the version that made it, or another "
                        "--workdir"
                    ) from error
                fault = f"it has no {MANIFEST} and cannot be restored: {line}"
            else:
                if not known and jax.process_index() == 0:
                    logger.warning(
                        "checkpoint %d of %s has no %s: its bytes could not be checked",
                        step, folder, MANIFEST,
                    )  # fmt: skip
                return step, restored
        faults.append(f"step {step}: {fault}")
        if jax.process_index() == 0:
            logger.warning(
                "checkpoint %d of %s is DAMAGED (%s); trying the one before it",
                step, folder, fault,
            )  # fmt: skip
    if faults:
        raise UserError(
            f"no checkpoint of {folder} is whole ({'; '.join(faults)}): put a copy in its place, "
            "or choose another --workdir"
        )
    return None


def restore_average(workdir: str | os.PathLike[str], like: Any) -> tuple[int, Any]:
    """Restores only the averaged parameters of a workdir's newest whole checkpoint.

    Args:
      workdir: of a training run. Nothing in it is changed.
      like: tree of ShapeDtypeStructs of the parameters, with shardings.

    Returns:
      The step and the parameters.

    Raises:
      UserError: the workdir has no whole checkpoint, or one of another model.
    """
    path = Path(workdir).absolute() / "checkpoints"
    if not path.is_dir():
        raise UserError(f"workdir {workdir} has no checkpoints: train there first")
    with ocp.CheckpointManager(path, item_names=("state",)) as manager:
        args = ocp.args.PyTreeRestore(
            {"ema": like},
            restore_args={"ema": ocp.checkpoint_utils.construct_restore_args(like)},
            partial_restore=True,
        )
        found = _restore_newest(
            path,
            manager.all_steps(),
            lambda step: manager.restore(step, args=ocp.args.Composite(state=args))["state"]["ema"],
        )
    if found is None:
        raise UserError(f"workdir {workdir} has no complete checkpoint: train there first")
    return found


def save_params(path: Path, params: Any) -> None:
    """Writes parameters, host or device arrays, as an orbax checkpoint of their own."""
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path.absolute(), params)
    write_manifest(path)


def load_params(path: Path) -> Any:
    """Reads a checkpoint of parameters alone, such as one of `save_params`: host arrays.

    Raises:
      UserError: it is damaged, or no such checkpoint.
    """
    with contextlib.suppress(FileNotFoundError):  # only ours have a manifest
        if fault := find_damage(path):
            raise UserError(f"{path} is damaged: {fault}")
    try:
        with ocp.PyTreeCheckpointer() as checkpointer:
            return checkpointer.restore(path.absolute())
    except Exception as error:  # whatever storage or metadata raise
        line = " ".join(str(error).split())[:200]
        raise UserError(f"{path} is damaged or no orbax checkpoint: {line}") from None


def claim_workdir(workdir: str | os.PathLike[str], config: Config) -> None:
    """Makes the workdir; if a run has saved a checkpoint there, checks that it is the same run.

    Raises:
      UserError: the workdir cannot be written, or belongs to another config.
    """
    workdir = Path(workdir)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        if not os.access(workdir, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise UserError(
            f"workdir {workdir} cannot be written ({error.strerror}); choose another --workdir"
        ) from None
    if any(path.name.isdigit() for path in (workdir / "checkpoints").glob("*")):
        check_config(workdir, config)


def note_config(workdir: str | os.PathLike[str], config: Config) -> None:
    """Writes the config of the run that begins into its workdir."""
    path = Path(workdir) / "config.json"
    scratch = path.with_name(f".config.json.{os.getpid()}")
    scratch.write_text(json.dumps(json.loads(config.to_json()), indent=1) + "\n", encoding="utf-8")
    os.replace(scratch, path)


def check_config(workdir: str | os.PathLike[str], config: Config) -> None:
    """Checks that a workdir is of a run with this config.

    Raises:
      UserError: it is of another one, or of none.
    """
    path = Path(workdir) / "config.json"
    try:
        theirs = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"{workdir} is not the workdir of a run: cannot read {path.name} ({error.strerror})"
        ) from None
    except ValueError:
        raise UserError(
            f"{path} is not valid JSON; choose another --workdir or remove that file"
        ) from None
    ours = json.loads(config.to_json())
    old, new = (traverse_util.flatten_dict(c, sep=".") for c in (theirs, ours))
    # A key that the run's config lacks is newer than the run.
    for key in sorted(old):
        free = any(key == name or key.startswith(name + ".") for name in _FREE)
        if not free and old.get(key) != new.get(key):
            raise UserError(
                f"workdir {workdir} belongs to a run with {key}={old.get(key)!r}, this one has "
                f"{new.get(key)!r}; choose another --workdir"
            )
