"""Which checkpoint of several is restored: the newest whose bytes are those that were written."""

import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from instella_jax.errors import UserError
from instella_jax.manifest import MANIFEST, find_damage

logger = logging.getLogger(__name__)


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


def restore_newest(
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
