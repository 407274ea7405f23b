"""The config of a workdir's run, as a config file that the command line can name and change.

`--config=own_config.py:{"workdir": ..., "config": ...}` is what `arguments.parse_flags` makes of a
`--workdir` alone.
"""

import importlib.util
import json
import sys
from pathlib import Path

from instella_jax.config import Config
from instella_jax.errors import UserError
from instella_jax.stored_config import complete
from instella_jax.training.workdir import read_config


def get_config(given: str) -> Config:
    """Return the config in a workdir, with keys newer than the run as another config has them.

    Args:
      given: JSON: the "workdir", and the "config" that was named beside it or null.

    Raises:
      UserError: the workdir is of no run, or of another stage than the config.
    """
    names = json.loads(given)
    own = read_config(names["workdir"])
    newer = None
    if names["config"] is not None:
        newer = load_config(names["config"])
        if newer.stage != own.stage:
            raise UserError(
                f"--config={names['config']} is of stage {newer.stage!r}, the run of "
                f"{names['workdir']} of stage {own.stage!r}: leave --config out, which takes the "
                "run's own config"
            )
    complete(own, newer)
    return own


def load_config(config: str) -> Config:
    """Return the config that a file gives, with a variant after a colon where one is wanted."""
    path, *variant = config.split(":", 1)
    spec = importlib.util.spec_from_file_location(f"given_{Path(path).stem}", path)
    if spec is None or spec.loader is None:
        raise UserError(f"config file {path!r} cannot be read as Python")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module.get_config(*variant)
