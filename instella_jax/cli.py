"""The console command `instella-jax`: a config's run, import and export of models, data sets."""

import argparse
import os
import signal
import sys
from collections.abc import Sequence

from instella_jax.commands.app import add_parser as add_app_parser
from instella_jax.commands.data import add_parser as add_data_parser
from instella_jax.commands.data import run as run_data
from instella_jax.commands.measure import add_parser as add_measure_parser
from instella_jax.commands.measure import run as run_measure
from instella_jax.config_keys import path_argument
from instella_jax.errors import command_line


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of everything that does not begin with a flag."""
    parser = argparse.ArgumentParser(
        prog="instella-jax",
        description="Imports and exports models, makes data sets.",
        epilog="instella-jax --config=FILE ... trains, evaluates or samples, as "
        "python -m instella_jax.main --config=FILE ... does.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    take = commands.add_parser("import", help="published checkpoints -> a model folder")
    take.add_argument(
        "source",
        type=path_argument,
        metavar="DIR",
        help="with bae/model.safetensors and diffusion.pt, ar.pt or both",
    )
    take.add_argument(
        "--text-encoder",
        type=path_argument,
        required=True,
        metavar="OLMO",
        help="with config.json, model.safetensors or shards, a text tokenizer",
    )
    take.add_argument(
        "--out", type=path_argument, required=True, metavar="MODEL", help="the model folder to make"
    )
    take.add_argument(
        "--sizes",
        type=path_argument,
        metavar="FILE.json",
        help='sizes that shapes do not tell and that are not the published ones: {"bae": '
        '{"axes_dims_rope": [8, 28, 28], "downsample_idx": [7], "upsample_idx": [7], '
        '"bae_scale": 1024}, "generator": {...}, "text": {...}}',
    )
    give = commands.add_parser("export", help="a model folder -> another form of it")
    give.add_argument("source", type=path_argument, metavar="MODEL", help="a model folder")
    give.add_argument(
        "--to",
        required=True,
        choices=("reference", "orbax", "safetensors"),
        help="reference: the published layout; orbax, safetensors: a model folder whose weights "
        "are stored so",
    )
    give.add_argument(
        "--out", type=path_argument, required=True, metavar="DIR", help="the folder to make"
    )
    add_data_parser(commands)
    add_measure_parser(commands)
    add_app_parser(commands)
    keys = commands.add_parser("keys", help="what the keys of the configs mean, and their values")
    keys.add_argument(
        "config",
        nargs="?",
        metavar="CONFIG[:VARIANT]",
        help="print its keys with their values, for example t2i_diffusion:instella_512; without, "
        "all keys as docs/config.md has them",
    )
    commands.add_parser("doctor", help="what jax computes with here, and what is wrong with it")
    return parser


def run(arguments: Sequence[str]) -> None:
    """Run a command.

    Raises:
      UserError: see the command.
    """
    options = make_parser().parse_args(arguments)
    if options.command == "data":
        run_data(options)
        return
    if options.command == "eval":
        run_measure(options)
        return
    if options.command == "keys":
        from instella_jax.commands import keys

        keys.main(options.config)
        return
    if options.command == "app":
        from instella_jax.commands import app

        app.run(options)
        return
    if options.command == "doctor":
        from instella_jax.commands import doctor

        sys.exit(doctor.main())
    # Nothing is computed: an accelerator that someone trains on stays as it is.
    os.environ["JAX_PLATFORMS"] = "cpu"
    # So that a command that is told to stop still clears its unfinished output away.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if options.command == "import":
        from instella_jax.weights.published import import_model
        from instella_jax.weights.tensor_files import read_json_file

        sizes = read_json_file(options.sizes) if options.sizes else None
        import_model(options.source, options.text_encoder, options.out, sizes)
    else:
        from instella_jax.weights.export import export_model

        export_model(options.source, options.to, options.out)
    print(options.out)


def main() -> None:
    """Run a command; `instella-jax --config=...` is `python -m instella_jax.main --config=...`."""
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
