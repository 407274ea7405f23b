"""`instella-jax data ...`: pictures in whatever form -> shards -> codes, to train from."""

import argparse
import contextlib
import logging
import os
from typing import Any

from instella_jax.commands.json_report import add_json
from instella_jax.errors import UserError
from instella_jax.user_paths import expand, path_argument

_PART = "this command's part of the work where several share it and OUT, from 0/N to N-1/N"

EXAMPLES = """\
examples:
  instella-jax data scenes data/tars --count=4000
  instella-jax data import data/tars data/shards --min-side=64
  instella-jax data encode demo data/shards data/codes"""


def add_parser(commands: Any) -> None:
    """Add `data` to the parser of the console command."""
    data = commands.add_parser(
        "data",
        help="data sets for training",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    data.set_defaults(run=run)
    kinds = data.add_subparsers(dest="action", required=True, metavar="ACTION")
    _add_import(kinds)
    _add_encode(kinds)
    _add_scenes(kinds)


def _add_import(kinds: Any) -> None:
    take = kinds.add_parser(
        "import",
        help="tars, parquet files, a TFDS data set or a folder -> shards of checked pictures",
        description="Checks and filters pictures with captions and writes shards for training "
        "(--config.data.kind=shards --config.data.shards.path=OUT). Run again after any "
        "interruption, it goes on where it stopped. OUT/report.json says what was left out.",
    )
    take.add_argument(
        "source",
        nargs="+",
        metavar="IN",
        help="files (.tar, also .gz, .bz2 or .xz; .parquet) or folders; in quotes also patterns "
        "like 'shards-{000..012}.tar' and names with commas between them",
    )
    take.add_argument("out", type=path_argument, metavar="OUT", help="folder of the shards")
    take.add_argument(
        "--kind",
        default="auto",
        choices=("auto", "webdataset", "parquet", "tfds", "folder"),
        help="what IN is (default: found out by its files)",
    )
    take.add_argument(
        "--split",
        default="train",
        help="of a TFDS data set, or of parquet files that are named by their splits, as "
        "train-00000-of-00005.parquet or test/0000.parquet; all: every one of these "
        "(default: %(default)s)",
    )
    take.add_argument(
        "--min-side", type=int, default=0, metavar="PIXELS", help="leave out smaller pictures"
    )
    take.add_argument(
        "--max-watermark",
        type=float,
        default=0.5,
        metavar="SCORE",
        help="leave out pictures with a greater pwatermark (default: %(default)s)",
    )
    take.add_argument(
        "--max-aspect",
        type=float,
        default=0.0,
        metavar="RATIO",
        help="leave out pictures whose longer side is more times the shorter one",
    )
    take.add_argument(
        "--no-captions", action="store_true", help="also keep pictures without a caption"
    )
    take.add_argument(
        "--caption-keys",
        default="",
        metavar="A,B",
        help="columns, JSON keys or features that captions are in (default: the usual names)",
    )
    take.add_argument(
        "--image-key", default="", metavar="A", help="column or feature of the pictures"
    )
    take.add_argument(
        "--shard-size",
        type=int,
        default=10_000,
        metavar="N",
        help="pictures in a shard, of a folder or a TFDS data set (default: %(default)s); a tar "
        "or parquet file is a shard",
    )
    take.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, metavar="N",
        help="processes (default: one per core, %(default)s)",
    )  # fmt: skip
    take.add_argument("--part", default="0/1", metavar="I/N", help=_PART)
    add_json(take)
    take.set_defaults(act=_import)


def _add_encode(kinds: Any) -> None:
    encode = kinds.add_parser(
        "encode",
        help="shards of pictures -> shards of codes",
        description="Encodes a data set once with an image tokenizer, so that generators train "
        "without it (--config.data.kind=codes --config.data.codes.path=OUT). Run again after any "
        "interruption, it goes on where it stopped.",
    )
    encode.add_argument(
        "model", type=expand, metavar="MODEL", help="model folder of a tokenizer, or demo"
    )
    encode.add_argument(
        "source", type=path_argument, metavar="IN", help="what `data import` has made"
    )
    encode.add_argument("out", type=path_argument, metavar="OUT", help="folder of the codes")
    encode.add_argument(
        "--image-size",
        type=int,
        default=0,
        metavar="PIXELS",
        help="side of the encoded pictures (default: the tokenizer's own)",
    )
    encode.add_argument(
        "--crops",
        type=int,
        default=1,
        metavar="N",
        help="the centre and N-1 random crops of each picture (default: %(default)s)",
    )
    encode.add_argument(
        "--flip",
        action="store_true",
        help="also the mirror image of each; not where captions speak of left and right",
    )
    encode.add_argument(
        "--min-keep",
        type=float,
        default=0.8,
        metavar="PART",
        help="smallest part of the shorter side that a random crop keeps (default: %(default)s)",
    )
    encode.add_argument("--seed", type=int, default=0, help="of the random crops")
    encode.add_argument(
        "--batch-size", type=int, default=64, metavar="N",
        help="pictures at a time (default: %(default)s)",
    )  # fmt: skip
    encode.add_argument(
        "--dtype", default="float32", choices=("float32", "bfloat16"),
        help="type of the computation (default: %(default)s)",
    )  # fmt: skip
    encode.add_argument(
        "--workers", type=int, default=0, metavar="N",
        help="processes that decode and crop (default: threads of this one)",
    )  # fmt: skip
    encode.add_argument("--part", metavar="I/N", help=_PART)
    encode.add_argument(
        "--distributed", default="auto", choices=("auto", "off", "slurm", "tpu"),
        help="how processes that share the work find each other, as in training: started by one "
        "of the scripts in launch/, they need no --part (default: %(default)s)",
    )  # fmt: skip
    add_json(encode)
    encode.set_defaults(act=_encode)


def _add_scenes(kinds: Any) -> None:
    scenes = kinds.add_parser(
        "scenes",
        help="embedded emoji scenes -> webdataset tars, to try the other two with",
    )
    scenes.add_argument("out", type=path_argument, metavar="OUT", help="folder of the tars")
    scenes.add_argument(
        "--count", type=int, default=2_000, metavar="N", help="pictures (default: %(default)s)"
    )
    scenes.add_argument(
        "--per-tar", type=int, default=1_000, metavar="N",
        help="pictures in a tar (default: %(default)s)",
    )  # fmt: skip
    scenes.add_argument(
        "--size", type=int, default=64, metavar="PIXELS", help="their side (default: %(default)s)"
    )
    scenes.add_argument("--seed", type=int, default=0, help="of the scenes")
    add_json(scenes)
    scenes.set_defaults(act=_scenes)


def run(options: argparse.Namespace) -> dict[str, Any] | None:
    """Run the action that the arguments name, and return its report.

    Raises:
      UserError: an argument cannot be used, or see the action.
    """
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    for name in ("workers", "batch_size", "shard_size", "count", "per_tar"):
        low = 0 if name == "workers" else 1
        if getattr(options, name, low) < low:
            raise UserError(f"--{name.replace('_', '-')} must be at least {low}")
    return options.act(options)


def _import(options: argparse.Namespace) -> dict[str, Any]:
    from instella_jax.preparing import importing, readers
    from instella_jax.preparing.filters import Filters
    from instella_jax.preparing.import_report import report_lines
    from instella_jax.preparing.jobs import parse_part
    from instella_jax.reporting.progress import Progress

    keys = tuple(key.strip() for key in options.caption_keys.split(",") if key.strip())
    with contextlib.closing(Progress(interval=_INTERVAL)) as progress:
        report = importing.import_dataset(
            options.source,
            options.out,
            kind=options.kind,
            split=options.split,
            unit_size=options.shard_size,
            reading=importing.Reading(keys or readers.CAPTION_KEYS, options.image_key),
            filters=Filters(
                min_side=options.min_side,
                max_watermark=options.max_watermark,
                max_aspect=options.max_aspect,
                captions=not options.no_captions,
            ),
            workers=options.workers,
            part=parse_part(options.part),
            show=progress.update,
        )
    lines = [_WAITING] if report is None else report_lines(report)
    print("\n".join(lines))
    return _whole(report)


def _whole(report: dict[str, Any] | None) -> dict[str, Any]:
    """Return the report of a data set, which there is once all parts are done."""
    return {"complete": report is not None, **(report or {})}


# Seconds between two lines of progress in the log of a batch job.
_INTERVAL = 10.0
_WAITING = "this part is done; the data set is complete when the others are"


def _encode(options: argparse.Namespace) -> dict[str, Any] | None:
    from instella_jax.preparing.jobs import parse_part
    from instella_jax.runtime import distributed
    from instella_jax.runtime.failure import end_together

    part = parse_part(options.part) if options.part else None
    if part is None:
        distributed.join(distributed.detect(os.environ, options.distributed))
    with end_together():
        return _encode_part(options, part)


def _encode_part(
    options: argparse.Namespace, part: tuple[int, int] | None
) -> dict[str, Any] | None:
    import jax

    from instella_jax.models.layers import Execution
    from instella_jax.preparing import encoding
    from instella_jax.reporting.progress import Progress
    from instella_jax.runtime import compile_cache, devices
    from instella_jax.weights import model_folder

    compile_cache.use_cache()
    devices.find_devices()
    size = options.image_size
    if not size:
        folder = model_folder.find(options.model, "tokenizer")
        size = int(model_folder.read_description(folder).get("image_size", 0))
        if not size:
            raise UserError(f"{folder} does not say its picture size; give --image-size=PIXELS")
    if options.flip and jax.process_index() == 0:
        print(
            "--flip: mirror images keep the captions of their pictures, and those that say left or "
            "right become wrong; leave it out where there are such"
        )
    count = jax.process_count()
    progress = Progress(
        enabled=jax.process_index() == 0,
        interval=_INTERVAL,
        prefix=f"process 0 of {count}: " if count > 1 else "",
    )
    with contextlib.closing(progress):
        report = encoding.encode_dataset(
            options.model,
            options.source,
            options.out,
            views=encoding.Views(size, options.crops, options.flip, options.min_keep, options.seed),
            batch_size=options.batch_size,
            workers=options.workers,
            part=part,
            run=Execution(dtype=options.dtype),
            show=progress.update,
        )
    if report is None:
        if part is not None:
            print(_WAITING)
        return None if part is None else _whole(None)
    print(
        f"encoded {report['kept']} pictures, {report['bytes'] / 2**20:.2f} MiB of codes"
        + (f"; {report['dropped']} could not be read" if report["dropped"] else "")
    )
    return _whole(report)


def _scenes(options: argparse.Namespace) -> dict[str, Any]:
    from instella_jax.preparing.scene_tars import write_tars

    paths = write_tars(options.out, options.count, options.per_tar, options.size, options.seed)
    print(f"{options.count} pictures in {len(paths)} tar(s) in {options.out}")
    return {"pictures": options.count, "tars": [str(path) for path in paths]}
