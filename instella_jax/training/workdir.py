"""The folder that a run lives in: its config, and one run at a time."""

import contextlib
import errno
import json
import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from instella_jax import stored_config
from instella_jax.config import Config
from instella_jax.errors import UserError
from instella_jax.runtime.digest import digest
from instella_jax.runtime.files import Locked, locked, write_json
from instella_jax.weights import model_folder

LOCK = ".lock"

# What may change between the runs of one workdir: how fast, how long and on what it learns, where
# data are, what is generated. Sizes, and what the numbers mean, may not.
_FREE = ("train", "optimizer", "mesh", "sample", "eval", "run", "data.workers", "data.folder.path",
         "data.shards.path", "data.codes.path", "plan", "profile", "init_from",
         "shipped", "loss.perceptual.weights")  # fmt: skip
# What the optimizer's state is, and what the network was trained to tell.
_FIXED = ("optimizer.kind", "loss.target")
_FIXED_WITH_MUON = ("optimizer.muon.exclude",)
# What may be other beside these where a run's weights are used, and nothing is trained.
USED = ("data", "loss")
# Of model folders that a run only reads the bytes count, not the place.
_MODELS = ("tokenizer", "text.encoder", "init_from")


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


def record_config(workdir: str | os.PathLike[str], config: Config) -> None:
    """Write the config of the run that begins into its workdir, and digests of what it only reads.

    `config.json` is the config; `models.json` has the digests of each model folder's files.
    """
    write_json(Path(workdir) / "models.json", model_digests(config))
    write_json(Path(workdir) / "config.json", json.loads(config.to_json()))


def read_config(workdir: str | os.PathLike[str]) -> Config:
    """Read the config of the run that a workdir is of, with the keys that this version has.

    Raises:
      UserError: it is of none.
    """
    path = Path(workdir) / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"{workdir} is not the workdir of a run: cannot read {path.name} ({error.strerror})"
        ) from None
    except ValueError:
        config = None
    if not isinstance(config, dict):
        raise UserError(f"{path} is not valid JSON; choose another --workdir or remove that file")
    return stored_config.from_json(config, path)


def changes(workdir: str | os.PathLike[str], config: Config) -> dict[str, tuple[Any, Any]]:
    """Return the keys in which a config differs from that of a workdir's run: old and new values.

    A key that the run's config lacks is newer than the run, and no change.
    """
    old, new = (
        traverse_util.flatten_dict(json.loads(c.to_json()), sep=".")
        for c in (read_config(workdir), config)
    )
    return {key: (old[key], new.get(key)) for key in sorted(old) if old[key] != new.get(key)}


def check_config(
    workdir: str | os.PathLike[str], config: Config, free: Collection[str] = ()
) -> None:
    """Check that a workdir is of a run with this config.

    Args:
      workdir: of the run.
      config: what goes on with it, or uses what it has learned.
      free: keys that may differ beside those that always may.

    Raises:
      UserError: it is of another one, or of none.
    """
    known = _recorded_digests(workdir)
    fixed = _FIXED + _FIXED_WITH_MUON * (config.optimizer.kind == "muon")
    for key, (old, new) in changes(workdir, config).items():
        if key in known and new:
            continue
        if _is_below(key, fixed) or not _is_below(key, (*_FREE, *free)):
            raise UserError(
                f"workdir {workdir} belongs to a run with {key}={old!r}, this one has {new!r}; "
                f"leave that key and --config out, which takes the run's own config, or choose "
                "another --workdir"
            )
    if not known:
        return
    found = model_digests(config)
    for key, files in known.items():
        for name, value in files.items():
            if found.get(key, {}).get(name) != value:
                folder = _folder(config, key)
                if folder is None:
                    continue
                fault = "has other bytes" if (folder / name).exists() else "is missing"
                raise UserError(
                    f"workdir {workdir} belongs to a run with another config.{key}: {name} {fault} "
                    f"in {folder}; give the folder that the run began with as "
                    f"--config.{key}=FOLDER, or choose another --workdir"
                )


def model_digests(config: Config) -> dict[str, dict[str, str]]:
    """Return the digests of files that a run reads of model folders, by config key and file.

    What is not there is left out.
    """
    digests: dict[str, dict[str, str]] = {}
    for key in _MODELS:
        if (folder := _folder(config, key)) is None:
            continue
        if key == "tokenizer":
            paths = [model_folder.weights_path(folder, "tokenizer")]
        elif key == "init_from":
            parts = ("generator", config.stage)
            paths = [model_folder.weights_path(folder, part) for part in parts]
        else:
            paths = [folder / "tokenizer.json"]
            if not config.text.trainable:
                paths.append(model_folder.weights_path(folder, "text"))
        digests[key] = {path.name: digest(path) for path in paths if path.exists()}
    return digests


def _folder(config: Config, key: str) -> Path | None:
    """Return the model folder that a run reads by a key of `_MODELS`, if it reads one."""
    if key == "init_from":
        # Only adapters need it after the beginning.
        return model_folder.find_weights(config) if _value(config, "lora.rank") else None
    value = _value(config, key)
    return model_folder.find(value, key) if value else None


def _recorded_digests(workdir: str | os.PathLike[str]) -> dict[str, dict[str, str]]:
    """Read `models.json`, {} where the run is from before there was one."""
    try:
        return json.loads((Path(workdir) / "models.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _value(config: Config, key: str) -> Any:
    """Return the value of a key such as "text.encoder", "" where the config has none."""
    for name in key.split("."):
        config = config.get(name, "") if config else ""
    return config


def _is_below(key: str, names: Collection[str]) -> bool:
    return any(key == name or key.startswith(name + ".") for name in names)


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
