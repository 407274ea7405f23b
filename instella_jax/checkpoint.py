"""Checkpoints of a run: the only user of orbax.

A checkpoint holds the train state, the position in the data and nothing else; `config.json` of the
workdir says what run it belongs to.
"""

import errno
import json
import logging
import os
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from flax import traverse_util

from instella_jax.config import Config
from instella_jax.errors import UserError
from instella_jax.train_state import TrainState

logger = logging.getLogger(__name__)

# What may change between the runs of one workdir: how long, how often, where, what is drawn.
_FREE = ("train.steps", "train.log_every", "train.eval_every", "train.save_every",
         "train.image_every", "train.keep", "train.max_skipped", "mesh", "sample", "eval", "run",
         "data.workers", "plan", "profile", "init_from", "shipped")  # fmt: skip


class Checkpoints:
    """The checkpoints of a workdir, written in the background."""

    def __init__(self, workdir: str | os.PathLike[str], keep: int = 3):
        """Opens `workdir/checkpoints`, made if needed; at most `keep` checkpoints stay."""
        path = Path(workdir).absolute() / "checkpoints"
        self._manager = ocp.CheckpointManager(
            path,
            options=ocp.CheckpointManagerOptions(max_to_keep=keep, create=True),
            item_names=("state", "data"),
        )

    def save(self, state: TrainState, data: Any, step: int) -> None:
        """Saves the state and the loader's position after `step` steps, unless that is there."""
        import grain

        if step in self._manager.all_steps():
            return
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state),
                data=grain.checkpoint.CheckpointSave(data),
            ),
        )

    def restore(self, like: TrainState, data: Any) -> TrainState | None:
        """Restores the newest checkpoint.

        Args:
          like: a state, or a tree of ShapeDtypeStructs with the shardings wanted.
          data: the loader, set to the position that belongs to the state.

        Returns:
          The state, or None where there is no checkpoint.

        Raises:
          UserError: the checkpoint does not fit the state.
        """
        import grain

        step = self._manager.latest_step()
        if step is None:
            return None
        like = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like
        )
        items: dict[str, Any] = dict(state=ocp.args.StandardRestore(like))
        position = self._position_of_other_processes(step)
        if position is None:
            items["data"] = grain.checkpoint.CheckpointRestore(data)
        try:
            restored = self._manager.restore(step, args=ocp.args.Composite(**items))
            if position is not None:
                data.set_state(position)
        except (ValueError, KeyError, OSError) as error:
            line = " ".join(str(error).split())[:300]
            raise UserError(
                f"checkpoint {step} of {self._manager.directory} cannot be restored: {line}; "
                "remove that folder to go on from the one before it"
            ) from error
        return restored["state"]

    def _position_of_other_processes(self, step: int) -> Any:
        """Returns the loader's position where as many processes as now did not save it."""
        from instella_jax.data.blocks import rescale_state

        index, now = jax.process_index(), jax.process_count()
        folder = Path(self._manager.directory) / str(step) / "data"
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

    @property
    def latest_step(self) -> int | None:
        """Step of the newest whole checkpoint."""
        return self._manager.latest_step()

    def wait(self) -> None:
        """Waits until everything is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits and closes."""
        self._manager.close()


def restore_average(workdir: str | os.PathLike[str], like: Any) -> tuple[int, Any]:
    """Restores only the averaged parameters of a workdir's newest checkpoint.

    Args:
      workdir: of a training run.
      like: tree of ShapeDtypeStructs of the parameters, with shardings.

    Returns:
      The step and the parameters.

    Raises:
      UserError: the workdir has no checkpoint, or one of another model.
    """
    path = Path(workdir).absolute() / "checkpoints"
    if not path.is_dir():
        raise UserError(f"workdir {workdir} has no checkpoints: train there first")
    with ocp.CheckpointManager(path, item_names=("state",)) as manager:
        step = manager.latest_step()
        if step is None:
            raise UserError(f"workdir {workdir} has no complete checkpoint: train there first")
        restore = ocp.args.PyTreeRestore(
            {"ema": like},
            restore_args={"ema": ocp.checkpoint_utils.construct_restore_args(like)},
            partial_restore=True,
        )
        try:
            restored = manager.restore(step, args=ocp.args.Composite(state=restore))
        except (ValueError, KeyError) as error:
            line = " ".join(str(error).split())[:200]
            raise UserError(f"workdir {workdir} holds another model: {line}") from error
    return step, restored["state"]["ema"]


def save_params(path: Path, params: Any) -> None:
    """Writes parameters, host or device arrays, as an orbax checkpoint of their own."""
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path.absolute(), params)


def load_params(path: Path) -> Any:
    """Reads a checkpoint of `save_params`: host arrays.

    Raises:
      UserError: it is damaged, or no such checkpoint.
    """
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
