"""`instella-jax train`, `plan`, `eval heldout`: modes of `instella_jax.main` by shorter names."""

import argparse
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from instella_jax.commands.json_report import add_json
from instella_jax.errors import UserError

TRAIN_EXAMPLES = """\
examples:
  instella-jax train t2i_diffusion
  instella-jax train t2i_diffusion --workdir=runs/mine train.steps=3000 train.batch_size=64
  instella-jax train runs/mine train.steps=5000        goes on with a run
  instella-jax train tokenizer data.kind=folder data.folder.path=/my/pictures
KEY=VALUE is --config.KEY=VALUE; instella-jax keys CONFIG lists the keys, and
python -m instella_jax.main --help the flags."""
EVAL_EXAMPLES = """\
examples:
  instella-jax eval heldout t2i_diffusion
  instella-jax eval heldout runs/mine --json
  instella-jax eval heldout tokenizer init_from=my/tokenizer"""
PLAN_EXAMPLES = """\
examples:
  instella-jax plan t2i_diffusion:instella_512
  instella-jax plan t2i_diffusion:instella_512 plan.chip=H200 plan.devices=8
  instella-jax plan t2i_diffusion:instella_512 --json"""


def add_parsers(commands: Any, run: Callable[[argparse.Namespace], None]) -> None:
    """Add the commands that run a config, by `instella_jax.main` with `flags_of` the arguments."""
    _add(commands, "train", "train a config, or go on with a run", TRAIN_EXAMPLES, run)
    text = "what a run will need: memory, speed, days; from shapes alone"
    add_json(_add(commands, "plan", text, PLAN_EXAMPLES, run), returned=False)


def add_heldout(actions: Any, run: Callable[[argparse.Namespace], None]) -> None:
    """Add `heldout`, the mode `eval`, to the actions of the command `eval`."""
    text = "held-out metrics of a config's shipped weights, of a run, or of a model"
    add_json(_add(actions, "heldout", text, EVAL_EXAMPLES, run), returned=False)


def _add(
    commands: Any,
    name: str,
    text: str,
    examples: str,
    run: Callable[[argparse.Namespace], None],
) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name, help=text, epilog=examples, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.set_defaults(run=run, takes_more=True)
    parser.add_argument(
        "config", metavar="CONFIG[:VARIANT]|RUN", help="a config by name or file, or a workdir"
    )
    parser.add_argument("changes", nargs="*", metavar="KEY=VALUE", help="keys to change")
    return parser


def flags_of(options: argparse.Namespace) -> list[str]:
    """Return the flags of `instella_jax.main` for the arguments of a command.

    Raises:
      UserError: an argument is neither a flag nor a change of a key.
    """
    run_folder = (Path(options.config).expanduser() / "config.json").is_file()
    flags = [f"--{'workdir' if run_folder else 'config'}={options.config}"]
    flags.append(f"--mode={options.command}")
    if getattr(options, "json", False):
        flags.append("--json")
    value_follows = False
    for item in [*options.changes, *options.rest]:
        if item.startswith("-") or value_follows:
            flags.append(item)
        elif re.match(r"[a-z]\w*(\.\w+)*=", item):
            flags.append(f"--config.{item}")
        else:
            raise UserError(f"unexpected argument {item!r}: keys are changed as KEY=VALUE")
        value_follows = item.startswith("-") and "=" not in item and not value_follows
    return flags
