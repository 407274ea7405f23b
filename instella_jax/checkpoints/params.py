"""Orbax checkpoints of which only parameters are wanted: a run's average, or a model's part."""

import contextlib
import os
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp

from instella_jax.checkpoints.integrity import find_damage, restore_newest, write_manifest
from instella_jax.errors import UserError


def restore_average(workdir: str | os.PathLike[str], like: Any) -> tuple[int, Any]:
    """Restore only the averaged parameters of a workdir's newest whole checkpoint.

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
    with ocp.CheckpointManager(path) as manager:
        args = ocp.args.PyTreeRestore(
            {"ema": like},
            restore_args={"ema": ocp.checkpoint_utils.construct_restore_args(like)},
            partial_restore=True,
        )
        found = restore_newest(
            path,
            manager.all_steps(),
            lambda step: manager.restore(step, args=ocp.args.Composite(state=args))["state"]["ema"],
        )
    if found is None:
        raise UserError(f"workdir {workdir} has no complete checkpoint: train there first")
    return found


def save_params(path: Path, params: Any) -> None:
    """Write parameters, host or device arrays, as an orbax checkpoint of their own."""
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path.absolute(), params)
    write_manifest(path)


def load_params(path: Path) -> Any:
    """Read a checkpoint of parameters alone, such as one of `save_params`: host arrays.

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
