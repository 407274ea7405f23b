"""The console command `instella-jax`: pictures, training, models, data sets.

Exit status: 0, or 2 with one sentence on standard error at a mistake; the others are in
docs/terminal.md.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any

from instella_jax.commands import (
    app,
    codec,
    completion,
    configured,
    data,
    generate,
    measure,
    models,
)
from instella_jax.commands.json_report import add_json, reporting
from instella_jax.errors import command_line

EPILOG = """\
instella-jax COMMAND --help has examples. instella-jax --config=FILE ... is
python -m instella_jax.main --config=FILE ..."""


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of everything that does not begin with a flag.

    What each command runs is in `run` of its arguments.
    """
    parser = argparse.ArgumentParser(
        prog="instella-jax",
        description="Generates pictures, trains, makes data sets, imports and exports models.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    generate.add_parser(commands)
    configured.add_parsers(commands, _configured)
    models.add_parsers(commands)
    codec.add_parsers(commands)
    data.add_parser(commands)
    configured.add_heldout(measure.add_parser(commands), _configured)
    app.add_parser(commands)
    keys = commands.add_parser("keys", help="what the keys of the configs mean, and their values")
    keys.set_defaults(run=_keys)
    keys.add_argument(
        "config",
        nargs="?",
        metavar="CONFIG[:VARIANT]",
        help="print its keys with their values, for example t2i_diffusion:instella_512; without, "
        "all keys as docs/config.md has them",
    )
    add_json(keys)
    doctor = commands.add_parser(
        "doctor", help="what jax computes with here, and what is wrong with it"
    )
    doctor.set_defaults(run=_doctor)
    doctor.add_argument("--json", action="store_true", help="for a machine to read")
    completion.add_parser(commands)
    return parser


def _configured(options: argparse.Namespace) -> None:
    from instella_jax.main import main

    sys.argv = [sys.argv[0], *configured.flags_of(options)]
    main()


def _keys(options: argparse.Namespace) -> dict[str, Any]:
    from instella_jax.commands import keys

    return keys.main(options.config)


def _doctor(options: argparse.Namespace) -> None:
    from instella_jax.commands import doctor

    sys.exit(doctor.main(as_json=options.json))


def run(arguments: Sequence[str]) -> None:
    """Run a command.

    Raises:
      UserError: see the command.
    """
    options, rest = make_parser().parse_known_args(arguments)
    if rest and not getattr(options, "takes_more", False):
        make_parser().parse_args(arguments)  # says what is wrong with them
    options.rest = rest
    with reporting(options.json if getattr(options, "reports", False) else False) as tell:
        tell(options.run(options))


def main() -> None:
    """Run a command; `instella-jax --config=...` is `python -m instella_jax.main --config=...`."""
    if "_ARGCOMPLETE" in os.environ:
        completion.complete(make_parser())
    arguments = sys.argv[1:]
    if arguments in (["--help"], ["-h"]):
        make_parser().print_help()
        print()
    if arguments and arguments[0].startswith("-"):
        from instella_jax.main import main as run_config

        run_config()
        return
    with command_line():
        run(arguments)
