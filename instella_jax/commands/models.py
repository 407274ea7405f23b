"""`instella-jax import` and `instella-jax export`: models from and to other forms."""

import argparse
import os
import signal
import sys
from typing import Any

from instella_jax.commands.json_report import add_json
from instella_jax.user_paths import path_argument

IMPORT_EXAMPLES = """\
examples:
  instella-jax import ~/Instella-T2I --text-encoder ~/AMD-OLMo-1B --out models/instella"""
EXPORT_EXAMPLES = """\
examples:
  instella-jax export models/instella --to reference --out published
  instella-jax export runs/t2i_diffusion/model --to orbax --out model-orbax"""


def add_parsers(commands: Any) -> None:
    """Add both to the parser of the console command."""
    take = commands.add_parser(
        "import",
        help="published checkpoints -> a model folder",
        epilog=IMPORT_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    take.set_defaults(run=_import)
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
    add_json(take)
    give = commands.add_parser(
        "export",
        help="a model folder -> another form of it",
        epilog=EXPORT_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    give.set_defaults(run=_export)
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
    add_json(give)


def _prepare() -> None:
    # Nothing is computed: an accelerator that someone trains on stays as it is.
    os.environ["JAX_PLATFORMS"] = "cpu"
    # So that a command that is told to stop still clears its unfinished output away.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))


def _import(options: argparse.Namespace) -> dict[str, str]:
    _prepare()
    from instella_jax.weights.published import import_model
    from instella_jax.weights.tensor_files import read_json_file

    sizes = read_json_file(options.sizes) if options.sizes else None
    import_model(options.source, options.text_encoder, options.out, sizes)
    print(options.out)
    return {"out": str(options.out)}


def _export(options: argparse.Namespace) -> dict[str, str]:
    _prepare()
    from instella_jax.weights.export import export_model

    export_model(options.source, options.to, options.out)
    print(options.out)
    return {"out": str(options.out), "form": options.to}
