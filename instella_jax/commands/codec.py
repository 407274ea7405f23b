"""`instella-jax encode` and `decode`: pictures to files of bits, and back."""

import argparse
import contextlib
import dataclasses
import json
import re
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

from instella_jax.errors import UserError
from instella_jax.user_paths import expand, path_argument

ENCODE_EXAMPLES = """\
examples:
  instella-jax encode photo.jpg --out codes
  instella-jax encode pictures/ more/*.png --model runs/tokenizer/model --out codes --json
  instella-jax encode poster.png --tile 64 --out codes
exit status: 0; 1 where some files were refused, each by name; 2 where nothing could be done"""
DECODE_EXAMPLES = """\
examples:
  instella-jax decode codes/photo.b1d --out pictures
  instella-jax decode codes/ --out thumbnails --size 32
exit status: as that of encode"""
_INTERVAL = 10.0


def add_parsers(commands: Any) -> None:
    """Add both to the parser of the console command."""
    encode = commands.add_parser(
        "encode",
        help="pictures -> files of bits",
        description="Encodes pictures of any size with an image tokenizer, each to a .b1d file "
        "(docs/formats.md) that keeps size, description, date, artist and copyright.",
        epilog=ENCODE_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    encode.set_defaults(run=_encode)
    encode.add_argument(
        "inputs", nargs="+", type=path_argument, metavar="PICTURE|FOLDER",
        help="folders are read at any depth",
    )  # fmt: skip
    encode.add_argument(
        "--tile", type=int, default=0, metavar="PIXELS",
        help="cut pictures into tiles of about this side, each with a code (default: one code for "
        "the whole picture)",
    )  # fmt: skip
    encode.add_argument(
        "--overlap", type=int, default=0, metavar="PIXELS",
        help="by which tiles reach into each other, to hide their seams (default: %(default)s)",
    )  # fmt: skip
    encode.add_argument("--no-metadata", action="store_true", help="keep the size alone")
    _add_common(encode, "store")
    decode = commands.add_parser(
        "decode",
        help="files of bits -> pictures",
        description="Decodes .b1d files to PNG files, as large as the originals were.",
        epilog=DECODE_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    decode.set_defaults(run=_decode)
    decode.add_argument("inputs", nargs="+", type=path_argument, metavar="FILE.b1d|FOLDER")
    decode.add_argument(
        "--size", type=_size, metavar="PIXELS|HEIGHTxWIDTH",
        help="longer side, or both sides, of the pictures (default: those of the originals)",
    )  # fmt: skip
    decode.add_argument(
        "--grid", type=_shape, metavar="HEIGHTxWIDTH",
        help="what the decoder draws before it is resized (default: the closest size that it was "
        "trained at)",
    )  # fmt: skip
    _add_common(decode, "use")


def _add_common(parser: argparse.ArgumentParser, verb: str) -> None:
    parser.add_argument(
        "--model", type=expand, default="demo", metavar="FOLDER",
        help="model folder of the tokenizer (default: demo, the shipped one)",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=path_argument, required=True, metavar="DIR", help="folder of the new files"
    )
    parser.add_argument(
        "--tokens", type=int, default=0, metavar="N",
        help=f"{verb} the first N tokens alone, where the tokenizer was trained for that "
        "(loss.tail_drop)",
    )  # fmt: skip
    parser.add_argument("--force", action="store_true", help="replace files that are there")
    parser.add_argument(
        "--json", action="store_true",
        help="a report in JSON on standard output; all else goes to standard error",
    )  # fmt: skip
    parser.add_argument(
        "--batch-size", type=int, default=16, metavar="N",
        help="codes at a time (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--dtype", default="float32", choices=("float32", "bfloat16"),
        help="type of the computation (default: %(default)s)",
    )  # fmt: skip


def _shape(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,4})", text)
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r}: expected HEIGHTxWIDTH, for example 48x64")
    return int(found[1]), int(found[2])


def _size(text: str) -> int | tuple[int, int]:
    return int(text) if re.fullmatch(r"[1-9]\d{0,4}", text) else _shape(text)


def _encode(options: argparse.Namespace) -> None:
    from instella_jax.codec.files import encode_files
    from instella_jax.codec.pictures import Encoding

    encoding = Encoding(tile=options.tile, overlap=options.overlap, tokens=options.tokens)
    if encoding.overlap and not encoding.tile:
        raise UserError("--overlap is of tiles: give --tile=PIXELS too")
    _run(
        options,
        encode_files,
        encoding,
        {"metadata": not options.no_metadata},
        lambda files: f"{sum(record['bytes'] for record in files):,} bytes",
    )


def _decode(options: argparse.Namespace) -> None:
    from instella_jax.codec.files import decode_files
    from instella_jax.codec.pictures import Decoding

    decoding = Decoding(size=options.size, grid=options.grid, tokens=options.tokens)
    _run(options, decode_files, decoding, {}, lambda files: "PNG")


def _run(
    options: argparse.Namespace,
    work: Callable[..., Any],
    how: Any,
    more: dict[str, Any],
    summary: Callable[[list[dict[str, Any]]], str],
) -> None:
    if options.batch_size < 1:
        raise UserError("--batch-size must be at least 1")
    # So that a command that is told to stop still clears its unfinished file away.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    import jax

    from instella_jax.codec.tokenizer import BinaryTokenizer
    from instella_jax.models.layers import Execution
    from instella_jax.reporting.progress import Progress, Throughput, progress_line
    from instella_jax.runtime import compile_cache, devices, sharding

    compile_cache.use_cache()
    devices.find_devices()
    mesh = sharding.make_mesh({"data": -1, "fsdp": 1, "tensor": 1}, jax.local_devices())
    tokenizer = BinaryTokenizer.from_pretrained(
        options.model, Execution(dtype=options.dtype), mesh=mesh, batch_size=options.batch_size
    )
    stream = sys.stderr if options.json else sys.stdout
    rate, begin = Throughput(), time.perf_counter()
    with contextlib.closing(Progress(stream, interval=_INTERVAL)) as progress:

        def show(done: int, total: int) -> None:
            rate.update(done)
            progress.update(progress_line(done, total, {}, rate.steps_per_second, noun="picture"))

        report = work(
            tokenizer, options.inputs, options.out, how, force=options.force, show=show,
            tell=lambda line: progress.message(f"refused: {line}"), **more,
        )  # fmt: skip
    seconds = time.perf_counter() - begin
    if options.json:
        settings = {k: v for k, v in dataclasses.asdict(how).items() if k != "metadata"}
        whole = {
            "command": options.command,
            "model": options.model,
            "weights": tokenizer.fingerprint,
            "settings": settings,
            "seconds": round(seconds, 3),
            **dataclasses.asdict(report),
        }
        print(json.dumps(whole, indent=1))
    print(
        f"{len(report.files)} picture(s), {summary(report.files)}, in {seconds:.1f} s: "
        f"{options.out}" + (f"; {len(report.refused)} refused" if report.refused else ""),
        file=stream,
    )
    if report.refused:
        sys.exit(1)
