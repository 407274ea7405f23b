"""The folder that a run lives in: its config, and one run at a time."""

import contextlib
import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from flax import traverse_util

from instella_jax.config import Config
from instella_jax.errors import UserError
from instella_jax.runtime.files import Locked, locked, write_json

LOCK = ".lock"

# What may change between the runs of one workdir: how long, how often, where, what is drawn.
_FREE = ("train.steps", "train.log_every", "train.eval_every", "train.save_every",
         "train.image_every", "train.keep", "train.max_skipped", "mesh", "sample", "eval", "run",
         "data.workers", "plan", "profile", "init_from", "shipped")  # fmt: skip


def claim_workdir(workdir: str | os.PathLike[str], config: Config) -> None:
    """Make the workdir; if a run has saved a checkpoint there, check that it is the same run.

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
    """Write the config of the run that begins into its workdir."""
    write_json(Path(workdir) / "config.json", json.loads(config.to_json()))


def check_config(workdir: str | os.PathLike[str], config: Config) -> None:
    """Check that a workdir is of a run with this config.

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


@contextlib.contextmanager
def only_run(workdir: str | os.PathLike[str]) -> Iterator[None]:
    """Hold a workdir for the run of this process and those that it has joined.

    The kernel lets go of the lock when the first process ends, however it ends.

    Raises:
      UserError: another run holds it.
    """
    from jax.experimental import multihost_utils

    path = Path(workdir) / LOCK
    taken, who = False, ""
    with contextlib.ExitStack() as stack:
        try:
            if jax.process_index() == 0:
                stack.enter_context(locked(path))
        except Locked as holder:
            taken, who = True, f" ({holder})" if str(holder) else ""
        if multihost_utils.broadcast_one_to_all(np.bool_(taken)):
            raise UserError(
                f"workdir {workdir} is in use by another run{who}: wait until that has ended, or "
                "choose another --workdir"
            )
        yield
