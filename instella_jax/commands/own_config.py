"""The config of a workdir's run, as a config file that the command line can name and change.

`--config=own_config.py:{"workdir": ..., "config": ...}` is what `arguments.parse_flags` makes of a
`--workdir` alone.
"""

import json

from instella_jax.commands.config_file import load_config
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
