"""Arguments that the actions of `instella-jax eval` share which measure pictures."""

import argparse

from instella_jax.commands.json_report import add_json
from instella_jax.errors import UserError
from instella_jax.user_paths import expand, path_argument


def add_tokenizer_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the tokenizer that pictures go through, and the size that they do so at."""
    parser.add_argument(
        "model", type=expand, metavar="TOKENIZER", help="model folder of a tokenizer, or demo"
    )
    parser.add_argument(
        "--image-size", type=int, default=0, metavar="PIXELS",
        help="side of the crops (default: the tokenizer's own)",
    )  # fmt: skip


def add_report_arguments(parser: argparse.ArgumentParser) -> None:
    """Add how many pictures are measured at a time, and where the report goes."""
    parser.add_argument(
        "--batch-size", type=int, default=32, metavar="N",
        help="pictures at a time (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=path_argument, metavar="DIR", help="folder to make with the report"
    )
    add_json(parser)


def check_report_arguments(options: argparse.Namespace) -> None:
    """Check these two before anything is computed.

    Raises:
      UserError: a batch would be empty, or the folder is there.
    """
    if options.batch_size < 1:
        raise UserError("--batch-size must be at least 1")
    if options.out is not None and options.out.exists():
        raise UserError(f"{options.out} is there already: give another --out or move it away")
