"""Pictures for a benchmark's own programs: sampled on all devices, resumable, in exact layouts."""

import dataclasses
import hashlib
import itertools
import json
import shutil
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from instella_jax.errors import UserError
from instella_jax.evaluation.layouts import LAYOUTS, Piece
from instella_jax.reporting.pictures import save_png
from instella_jax.runtime.files import replacing, write_bytes, write_json
from instella_jax.sampling.options import Options, requests_of
from instella_jax.sampling.sampler import Sampler


def export(
    benchmark: str,
    pieces: Sequence[Piece],
    sampler: Sampler,
    options: Options,
    out: Path,
    about: dict[str, Any],
    show: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Make the pictures of a benchmark; run again after any interruption, it goes on.

    Several processes sample together, and the first of them writes. What it was made with is in
    `OUT.export.json` beside the folder, so that the layout itself holds nothing else.

    Args:
      benchmark: one of `LAYOUTS`.
      pieces: what to make, see `layouts.read_pieces`.
      sampler: the model.
      options: of sampling; picture j of a prompt has the seed `options.seed` + j.
      out: the folder, or the .npz file of adm.
      about: the model's weights and whatever else tells this export from another.
      show: is given how many pictures there are, of how many.

    Raises:
      UserError: `out` holds something else.
    """
    folder = out.with_name(f"{out.name}.parts") if benchmark == "adm" else out
    settings = json.loads(json.dumps({
        "benchmark": benchmark,
        "sampling": {**dataclasses.asdict(options), "batch_size": None, "kernel": None},
        "pieces": _digest(pieces),
        **about,
    }))  # fmt: skip
    first = jax.process_index() == 0
    done = np.ones(len(pieces), bool)
    if first:
        _claim(out, folder, settings)
        if not (benchmark == "adm" and out.exists()):
            done = np.array([_is_done(folder, piece) for piece in pieces])
    done = _agreed(done)
    total = sum(piece.count for piece in pieces)
    made = sum(piece.count for piece, there in zip(pieces, done, strict=True) if there)
    todo = [piece for piece, there in zip(pieces, done, strict=True) if not there]
    # Those that begin with the same number are sampled together.
    todo.sort(key=lambda piece: (piece.first, piece.count))
    for (start, count), group in itertools.groupby(todo, lambda p: (p.first, p.count)):
        group = list(group)
        asked = dataclasses.replace(options, seed=options.seed + start, images_per_prompt=count)
        pictures: list[np.ndarray] = []
        waiting = iter(group)
        requests = requests_of([piece.prompt for piece in group], asked)
        for batch in sampler.batches(requests, asked):
            pictures.extend(batch.images)
            while len(pictures) >= count:
                piece, images = next(waiting), np.stack(pictures[:count])
                del pictures[:count]
                if first:
                    _write(folder, piece, images)
                made += count
            show(made, total)
    if first:
        _finish(benchmark, pieces, out, folder)


def _digest(pieces: Sequence[Piece]) -> str:
    text = json.dumps([dataclasses.asdict(piece) for piece in pieces])
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def _claim(out: Path, folder: Path, settings: dict[str, Any]) -> None:
    """Note what an export is made with, or check that it goes on with the same.

    Raises:
      UserError: it does not, or `out` is not an export's.
    """
    record = out.with_name(f"{out.name}.export.json")
    if record.exists():
        there = json.loads(record.read_text(encoding="utf-8"))
        if different := [
            k for k in settings.keys() | there.keys() if settings.get(k) != there.get(k)
        ]:
            raise UserError(
                f"{out} was begun with another {', '.join(sorted(different))} (see {record}): give "
                "another --out, or remove both"
            )
        return
    if out.exists() and (out.is_file() or any(out.iterdir())):
        raise UserError(f"{out} is there already and no export's: give another --out")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(record, settings)


def _is_done(folder: Path, piece: Piece) -> bool:
    return all((folder / name).is_file() for name in (*piece.texts, *piece.files))


def _agreed(done: np.ndarray) -> np.ndarray:
    """Return what the first process found."""
    if jax.process_count() == 1:
        return done
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.broadcast_one_to_all(done))


def _write(folder: Path, piece: Piece, images: np.ndarray) -> None:
    for name, text in piece.texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_bytes(folder / name, text.encode())
    whole = [_two_by_two(images)] if piece.grid else images
    for name, image in zip(piece.files, whole, strict=True):
        path = folder / name
        if path.suffix == ".webp":
            _save_webp(path, image)
        else:
            save_png(path, image)


def _two_by_two(images: np.ndarray) -> np.ndarray:
    """Put up to four images [n, h, w, 3] by rows into [2 h, 2 w, 3], black where none is left."""
    count, height, width, channels = images.shape
    full = np.zeros((4, height, width, channels), np.uint8)
    full[:count] = images
    rows = full.reshape(2, 2, height, width, channels).swapaxes(1, 2)
    return rows.reshape(2 * height, 2 * width, channels)


def _save_webp(path: Path, image: np.ndarray) -> None:
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as scratch:
        Image.fromarray(image).save(scratch, format="WEBP", lossless=True)


def _finish(benchmark: str, pieces: Sequence[Piece], out: Path, folder: Path) -> None:
    if index := LAYOUTS[benchmark].index:
        for name, values in index(pieces, folder).items():
            write_json(folder / name, values)
    if benchmark == "adm" and folder.exists():
        if not out.exists():
            with replacing(out) as scratch:
                write_npz(scratch, [folder / piece.files[0] for piece in pieces])
        shutil.rmtree(folder)


def write_npz(path: Path, pictures: Sequence[Path]) -> None:
    """Write pictures of one size as `arr_0`, uint8 [N, h, w, 3], one after the other."""
    from PIL import Image

    with Image.open(pictures[0]) as image:
        shape = (len(pictures), image.height, image.width, 3)
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, allowZip64=True) as archive,
        archive.open("arr_0.npy", "w", force_zip64=True) as file,
    ):
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        for picture in pictures:
            with Image.open(picture) as image:
                file.write(np.asarray(image, np.uint8).tobytes())
