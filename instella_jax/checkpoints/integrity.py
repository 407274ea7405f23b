"""Which checkpoint is whole: hashes of its files, and the newest whose bytes are as written."""

import hashlib
import json
import logging
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from instella_jax.errors import UserError
from instella_jax.runtime.files import write_json

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"


def write_manifest(folder: Path, leave_out: frozenset[str] = frozenset()) -> None:
    """Write `manifest.json`: size and SHA-256 of every file under a folder, by relative path.

    Args:
      folder: of the files.
      leave_out: relative paths of files that may change later.

    Raises:
      OSError: a file cannot be read, or the manifest not be written.
    """
    names = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
    names = [name for name in names if name not in leave_out and name != MANIFEST]
    # Hashing lets go of the interpreter: large checkpoints use several cores.
    with ThreadPoolExecutor(4) as pool:
        digests = list(pool.map(lambda name: _digest(folder / name), names))
    files = {
        name: {"bytes": (folder / name).stat().st_size, "sha256": digest}
        for name, digest in zip(names, digests, strict=True)
    }
    write_json(folder / MANIFEST, {"files": files})


def find_damage(folder: Path) -> str | None:
    """Say what differs from the manifest of a folder: the first file and how; None if nothing.

    Raises:
      FileNotFoundError: there is no manifest.
    """
    text = (folder / MANIFEST).read_bytes()
    try:
        files = {
            name: (int(entry["bytes"]), str(entry["sha256"]))
            for name, entry in json.loads(text)["files"].items()
        }
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} is not readable"

    def check(name: str) -> str | None:
        size, digest = files[name]
        path = folder / name
        try:
            found = path.stat().st_size
            if found != size:
                return f"{name} has {found} of {size} bytes"
            return None if _digest(path) == digest else f"{name} has other bytes than were written"
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"

    with ThreadPoolExecutor(4) as pool:
        return next((fault for fault in pool.map(check, sorted(files)) if fault), None)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _state_of(folder: Path) -> tuple[bool, str | None]:
    """Return whether a checkpoint has a manifest, and its damage; alike in all processes."""
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
    """Restore the newest whole checkpoint, and report those that were passed over.

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
