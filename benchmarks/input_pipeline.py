"""How fast data arrive: decoding, cropping, shards, codes, all per core where it can be told.

  python -m benchmarks.input_pipeline
  python -m benchmarks.input_pipeline --side=512 --source-side=768 --workers=0,2

Pictures are JPEG files of smooth noise, about as large as photographs of that size. In the end the
demo's generator trains on pictures and on their codes, with the shipped tokenizer or --tokenizer.
"""

import argparse
import contextlib
import io
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.arguments import seconds, whole, whole_list
from instella_jax.data.codes import CodeShards, PickVariant
from instella_jax.data.images import decode_picture
from instella_jax.data.loader import make_loader
from instella_jax.data.shards import ImageShards, Shard, shard_writer, write_dataset_file
from instella_jax.data.transforms import TrainTransform, crop_resize
from instella_jax.errors import UserError, command_line


def photographs(count: int, side: int) -> list[bytes]:
    """Return JPEG files, 4:3, with the shorter side of `side` pixels."""
    rng, files = np.random.default_rng(0), []
    for _ in range(count):
        coarse = rng.integers(0, 256, (side // 12, side // 9, 3), np.uint8)
        large = Image.fromarray(coarse).resize((side * 4 // 3, side), Image.Resampling.BICUBIC)
        grain = rng.normal(0, 4, (side, side * 4 // 3, 1))
        picture = np.clip(np.asarray(large) + grain, 0, 255).astype(np.uint8)
        file = io.BytesIO()
        Image.fromarray(picture).save(file, "jpeg", quality=90)
        files.append(file.getvalue())
    return files


def rate(
    work: Callable[[], int], seconds: float, clock: Callable[[], float] = time.perf_counter
) -> float:
    """Return how many things a second `work` does, which returns how many it did."""
    work()
    start, total = clock(), 0
    while (spent := clock() - start) < seconds:
        total += work()
    return total / spent


def one_core(files: list[bytes], side: int, seconds: float) -> None:
    """Return decoding and cropping by one thread, by processor time: other programs take none of
    it."""
    keep = -(-side * 10 // 8)
    images = [decode_picture(io.BytesIO(file), "", decode_side=keep) for file in files]

    def decode() -> int:
        for file in files:
            decode_picture(io.BytesIO(file), "", decode_side=keep)
        return len(files)

    def crop() -> int:
        for image in images:
            crop_resize(image, side, side, scale=0.9)
        return len(files)

    first = rate(decode, seconds, time.process_time)
    second = rate(crop, seconds, time.process_time)
    show("decode", first)
    show(f"crop to {side}", second)
    show("decode + crop, one core", 1 / (1 / first + 1 / second))


def write_shards(folder: Path, files: list[bytes], copies: int) -> Path:
    """Return a data set of the files, each so many times."""
    folder.mkdir()
    path = folder / "0.arrayrecord"
    with shard_writer(path, path.with_suffix(".scratch")) as writer:
        for number in range(copies * len(files)):
            header = {"key": str(number), "texts": ["a photo of smooth noise"], "size": [0, 0]}
            writer.write(header, files[number % len(files)])
    write_dataset_file(
        folder, "images", [Shard(path.name, writer.records, path.stat().st_size)], {}
    )
    return folder


def write_codes(folder: Path, records: int, code_bytes: int) -> Path:
    """Return a data set of random codes."""
    folder.mkdir()
    path, rng = folder / "0.arrayrecord", np.random.default_rng(0)
    with shard_writer(path, path.with_suffix(".scratch")) as writer:
        for number in range(records):
            header = {"key": str(number), "texts": ["a photo of smooth noise"]}
            writer.write(header, rng.bytes(code_bytes))
    details = {"num_tokens": code_bytes // 8, "bits": 64, "variants": 1, "image_size": 512}
    shards = [Shard(path.name, records, path.stat().st_size)]
    write_dataset_file(folder, "codes", shards, {**details, "tokenizer": ""})
    return folder


def loaded(source: Any, transform: Any, batch_size: int, workers: int, seconds: float) -> float:
    """Sample a second that a loader hands over."""
    loader = make_loader(
        source, batch_size=batch_size, seed=0, transform=transform, workers=workers
    )
    with contextlib.closing(loader):

        def take() -> int:
            return len(next(loader)["text"])

        return rate(take, seconds)


def training(config: Any, steps: int) -> tuple[float, float]:
    """Return images a second, and the share of time that the loop waits, after compiling."""
    from instella_jax.reporting.metrics import read_metrics
    from instella_jax.training.loop import train

    with tempfile.TemporaryDirectory() as workdir:
        config.train.update(
            steps=2 * steps, log_every=steps, eval_every=0, save_every=0, image_every=0
        )
        config.eval.update(batches=1, batch_size=config.train.batch_size, pictures=0)
        with contextlib.redirect_stdout(io.StringIO()):
            train(config.lock(), workdir)
        rows = [row for row in read_metrics(workdir) if "train/data_wait" in row]
    return rows[-1]["train/images_per_second"], rows[-1]["train/data_wait"]


def train_both(folder: Path, tokenizer: str, steps: int) -> None:
    """Return the demo's generator on scenes in shards, and on their codes."""
    from configs import t2i_diffusion
    from instella_jax.preparing.encoding import encode_dataset
    from instella_jax.preparing.importing import import_dataset
    from instella_jax.preparing.scene_tars import write_tars

    write_tars(folder / "tars", 4_000, 2_000)
    import_dataset(folder / "tars", folder / "scenes")
    encode_dataset(tokenizer, folder / "scenes", folder / "scene-codes", batch_size=100)
    speeds = []
    for kind, path in (("shards", "scenes"), ("codes", "scene-codes")):
        config = t2i_diffusion.get_config()
        config.tokenizer = tokenizer
        config.data.kind = kind
        config.data[kind].path = str(folder / path)
        speed, waited = training(config, steps)
        speeds.append(speed)
        show(f"training the demo on {kind}", speed, f"{waited:.1%} of the time waiting for data")
    show("  codes over pictures", speeds[1] / speeds[0], "times")


_rows: dict[str, float] = {}


def show(name: str, value: float, unit: str = "") -> None:
    """Print a line of the table."""
    _rows[name] = value
    print(f"{name:<44}{value:>10.1f}  {unit}".rstrip(), flush=True)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--side", type=whole(), default=512, help="of the crops, in pixels")
    parser.add_argument(
        "--source-side", type=whole(12), default=768, help="shorter side of the files"
    )
    parser.add_argument(
        "--workers", type=whole_list, default="0,2", help="numbers of worker processes to try"
    )
    parser.add_argument("--seconds", type=seconds, default=5.0, help="for each measurement")
    parser.add_argument("--tokenizer", default="demo", help="model folder; none: do not train")
    parser.add_argument("--steps", type=whole(), default=100, help="of training, measured")
    parser.add_argument("--json", type=Path, help="file for the figures")
    options = parser.parse_args()
    with command_line():
        check(options)
        run(options)


def check(options: argparse.Namespace) -> None:
    """Look first at what is used last.

    Raises:
      UserError: the tokenizer is none for the demo's generator, or the figures have no place.
    """
    from configs import t2i_diffusion
    from instella_jax.weights.model_folder import code_sizes

    if options.tokenizer != "none":
        demo: Any = t2i_diffusion.get_config().model
        code_sizes(options.tokenizer, demo.num_tokens, demo.bits)
    if options.json and (options.json.is_dir() or not options.json.parent.is_dir()):
        raise UserError(f"--json={options.json} cannot be written: name a file in a folder")


def run(options: argparse.Namespace) -> None:
    """Measure all, and print it."""
    files = photographs(16, options.source_side)
    size = sum(map(len, files)) / len(files) / 1024
    print(f"JPEG files of {size:.0f} KiB; images a second:")
    one_core(files, options.side, options.seconds)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        images = ImageShards(
            write_shards(folder / "images", files, 16), decode_side=-(-options.side * 10 // 8)
        )
        code = CodeShards(write_codes(folder / "codes", 20_000, 1_024))
        transform = TrainTransform(options.side, options.side)
        for workers in options.workers:
            where = f"{workers} workers" if workers else "threads"
            speed = loaded(images, transform, 16, workers, options.seconds)
            show(f"loader, shards, {where}", speed)
            speed = loaded(code, PickVariant(True), 256, workers, options.seconds)
            show(f"loader, codes, {where}", speed)
        if options.tokenizer != "none":
            train_both(folder, options.tokenizer, options.steps)
    if options.json:
        options.json.write_text(json.dumps(_rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
