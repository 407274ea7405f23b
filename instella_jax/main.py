"""Trains, evaluates or samples a stage. Examples:

python -m instella_jax.main --config=configs/t2i_diffusion.py --config.train.steps=1000
python -m instella_jax.main --config=configs/t2i_diffusion.py --mode=eval
python -m instella_jax.main --workdir=runs/t2i_diffusion --mode=eval
python -m instella_jax.main --config=configs/t2i_diffusion.py --mode=sample \\
    --config.sample.prompt="two red hearts on a blue background"

The files in configs/ say what each of them does and which keys it has.
"""

import functools
import logging
import os
from collections.abc import Callable
from typing import Any

from absl import app, flags
from ml_collections import config_flags

from instella_jax.commands.arguments import NO_CONFIG, default_workdir, parse_flags
from instella_jax.commands.json_report import reporting
from instella_jax.config_keys import check_values
from instella_jax.errors import UserError, command_line
from instella_jax.user_paths import expand

MODES = ("train", "eval", "sample", "plan")

_CONFIG = config_flags.DEFINE_config_file(
    "config",
    None,
    "Config file, with a variant after a colon where wanted "
    "(configs/t2i_diffusion.py:instella_512). --config.KEY=VALUE changes a key. With the --workdir "
    "of a run it may be left out: the run's own config is taken, always so to evaluate and to "
    "sample.",
    lock_config=True,
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Where the run lives. Default: runs/<config>[-<variant>]."
)
_MODE = flags.DEFINE_enum(
    "mode",
    "train",
    MODES,
    "train; eval: held-out metrics; sample: prompts to PNG; plan: memory, speed and days, "
    "told without accelerators.",
)
_JSON = flags.DEFINE_boolean(
    "json",
    False,
    "eval, plan: a report in JSON on standard output; all else goes to standard error.",
)
_DISTRIBUTED = flags.DEFINE_enum(
    "distributed",
    "auto",
    ("auto", "off", "slurm", "tpu"),
    "How the processes of a run over several hosts or GPUs find each other; auto: by the three "
    "flags below, by Slurm's environment, or by that of a TPU pod.",
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator_address",
    None,
    "host:port of process 0. These three also as JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, "
    "JAX_PROCESS_ID.",
)
_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many processes there are.")
_PROCESS = flags.DEFINE_integer("process_id", None, "Number of this process, from 0.")


def config_argument() -> str:
    """Return the value of --config as it was given."""
    flag: Any = flags.FLAGS["config"]
    return flag.config_filename


def dispatch(argv: list[str]) -> None:
    """Run the mode that the flags ask for."""
    if len(argv) > 1:
        raise UserError(f"unexpected argument {argv[1]!r}: values are given as --flag=value")
    if _CONFIG.value is None:
        raise UserError(NO_CONFIG)
    check_values(_CONFIG.value)
    if _JSON.value and _MODE.value not in ("eval", "plan"):
        raise UserError(f"--json is for --mode=eval and plan, not for --mode={_MODE.value}")
    with reporting(_JSON.value) as tell:
        dispatch_mode(tell)


def dispatch_mode(tell: Callable[[Any], None]) -> None:
    """Run the mode that the flags ask for, and tell its report if it has one."""
    if _MODE.value == "plan":
        from instella_jax.planning import report

        tell(report.as_values(report.main(_CONFIG.value), _CONFIG.value))
        return
    # Before jax starts, which reads the cache folder once.
    from instella_jax.runtime import distributed
    from instella_jax.runtime.failure import end_together

    setup = distributed.detect(
        os.environ, _DISTRIBUTED.value, _COORDINATOR.value, _PROCESSES.value, _PROCESS.value
    )
    distributed.join(setup)
    with end_together():
        run(setup.processes, tell)


def run(processes: int, tell: Callable[[Any], None]) -> None:
    """Train, evaluate or sample, as one of several processes perhaps."""
    from instella_jax.runtime import devices

    devices.start(_CONFIG.value, processes, training=_MODE.value != "sample")
    given = _WORKDIR.value and expand(_WORKDIR.value)
    workdir = given or default_workdir(config_argument())
    if _MODE.value == "train":
        from instella_jax.checkpoints.manager import silence_aborted_writes
        from instella_jax.training.loop import train

        silence_aborted_writes()
        train(_CONFIG.value, workdir)
    elif _MODE.value == "eval":
        from instella_jax.commands.evaluate import evaluate_config

        evaluate_config(_CONFIG.value, given, tell)
    else:
        from instella_jax.commands.generate import generate

        generate(_CONFIG.value, given)


def main() -> None:
    """Command-line entry: a user's mistake is one sentence on stderr and exit status 2."""
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    try:
        with command_line():
            app.run(dispatch, flags_parser=functools.partial(parse_flags, text=__doc__ or ""))
    except BrokenPipeError:
        os._exit(1)


if __name__ == "__main__":
    main()
