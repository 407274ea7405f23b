"""`data encode`: shards of pictures -> shards of codes, once for all training to come.

Axes: B records at a time, V variants of each, N latent tokens, K bits.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import math
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from instella_jax.codec.tokenizer import BinaryTokenizer
from instella_jax.data import codes
from instella_jax.data.loader import make_loader
from instella_jax.data.samples import BadSample
from instella_jax.data.shards import ImageShards, Shard
from instella_jax.data.transforms import crop_resize
from instella_jax.errors import UserError
from instella_jax.models.layers import Execution
from instella_jax.preparing.jobs import Job
from instella_jax.runtime import sharding
from instella_jax.runtime.failure import wait_for_all
from instella_jax.weights import model_folder

logger = logging.getLogger(__name__)

MAX_CROPS = 64


@dataclasses.dataclass(frozen=True)
class Views:
    """What of each picture is encoded: V = crops, or twice as many with `flip`.

    Attributes:
      image_size: side in pixels.
      crops: the first is the largest from the centre, the others are random.
      flip: also the mirror image of each crop; leave it where captions speak of left and right.
      min_keep: the smallest part of the limiting side that a random crop keeps, in (0, 1].
      seed: of the random crops.
    """

    image_size: int
    crops: int = 1
    flip: bool = False
    min_keep: float = 0.8
    seed: int = 0

    def __post_init__(self) -> None:
        """Check ranges.

        Raises:
          UserError: a value is out of range.
        """
        if not 1 <= self.crops <= MAX_CROPS or not 0 < self.min_keep <= 1 or self.seed < 0:
            raise UserError(
                f"crops must be in 1 to {MAX_CROPS}, min_keep in (0, 1], seed at least 0; got "
                f"{self.crops}, {self.min_keep}, {self.seed}"
            )

    @property
    def count(self) -> int:
        return self.crops * (2 if self.flip else 1)

    def cut(self, image: np.ndarray, number: int) -> np.ndarray:
        """Cut the variants of picture `number`: uint8 [h, w, 3] -> uint8 [V, side, side, 3]."""
        side, views = self.image_size, []
        for crop in range(self.crops):
            place: dict[str, float] = {}
            if crop:
                rng = np.random.default_rng((self.seed, number, crop))
                keep, x, y = rng.random(3)
                place = {"scale": self.min_keep + (1 - self.min_keep) * keep, "x": x, "y": y}
            view = crop_resize(image, side, side, **place)
            views += [view, view[:, ::-1]] if self.flip else [view]
        return np.stack(views)


class _Views:
    """Variants of the records of some shards, as a source that leaves nothing out."""

    def __init__(self, images: ImageShards, numbers: Sequence[int], views: Views):
        self._images, self._numbers, self._views = images, numbers, views

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: int) -> dict[str, Any]:
        number, side = self._numbers[index], self._views.image_size
        header: dict[str, Any] = {}
        try:
            header, payload = self._images.read(number)
            image = self._images.picture(payload, str(header.get("key")))
            image = self._views.cut(image, number)
        except BadSample as error:
            header = {**header, "dropped": str(error)}
            image = np.zeros((self._views.count, side, side, 3), np.uint8)
        return {"image": image, "index": index, "header": json.dumps(header)}


def encode_dataset(
    tokenizer: str,
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    views: Views | None = None,
    batch_size: int = 64,
    workers: int = 0,
    part: tuple[int, int] | None = None,
    run: Execution = Execution(),  # noqa: B008 (frozen)
    show: Callable[[str], None] = lambda line: None,
) -> dict[str, Any] | None:
    """Encode a data set of pictures; run again after any interruption, it goes on.

    A picture keeps its number, so that the splits of the codes are those of the pictures. One that
    cannot be read becomes a record without a code, which training skips.

    Args:
      tokenizer: model folder with an image tokenizer; "demo" is the shipped one.
      source: a data set made by `importing.import_dataset`.
      out: folder of the codes.
      views: what of each picture is encoded; None: the centre, at the tokenizer's own size.
      batch_size: pictures encoded at a time, variants counted.
      workers: processes that decode and crop; 0: threads of this one.
      part: (I, N): this is part I of N that are encoded apart and share `out`. None: the
        processes of `jax.distributed` share the work, each with its own devices.
      run: how the network is computed.
      show: is given a line of progress after each batch.

    Returns:
      {"kept", "dropped", "examples", "bytes"}, or None while other parts are not done, and in
      all processes but the first.

    Raises:
      UserError: the model or the data set cannot be used, or nothing could be encoded.
    """
    folder = model_folder.find(tokenizer, "tokenizer")
    description = model_folder.read_description(folder)
    sizes = model_folder.tokenizer_config(description.get("tokenizer", {}))
    views = views or Views(int(description.get("image_size", 0)))
    sizes.grid(views.image_size, views.image_size)
    images = ImageShards(
        source, captions=False, decode_side=math.ceil(views.image_size / views.min_keep)
    )
    details = {
        "num_tokens": sizes.num_tokens,
        "bits": sizes.bits,
        "variants": views.count,
        "image_size": views.image_size,
        "tokenizer": codes.fingerprint(folder),
    }
    shards: list[Shard] = images.description["shards"]
    plan = {"source": str(images.folder.resolve()), "options": dataclasses.asdict(views), **details}
    job = Job(out, plan, [f"{shard.file} ({shard.records}, {shard.bytes})" for shard in shards])
    index, count = part or (jax.process_index(), jax.process_count())
    with job.claim((index, count)) as todo:
        if todo:
            # The devices of this process: each process has shards of its own.
            mesh = sharding.make_mesh({"data": -1, "fsdp": 1, "tensor": 1}, jax.local_devices())
            encoder = BinaryTokenizer.from_pretrained(tokenizer, run, mesh=mesh)
            records = max(1, batch_size // views.count)
            _encode(job, images, shards, todo, views, encoder, records, workers, show)
    if part is None:
        wait_for_all("encoded")
        if index:
            return None
    results = job.results()
    if results is None:
        return None
    kept = sum(result["kept"] for result in results)
    if not kept:
        raise UserError(f"no picture of {source} could be encoded; import the data set again")
    job.complete("codes", results, details)
    return {
        "kept": kept,
        "dropped": sum(result["dropped"] for result in results),
        "examples": [name for result in results for name in result["examples"]][:5],
        "bytes": kept * views.count * codes.packed_bytes(sizes.num_tokens, sizes.bits),
    }


class _PartialShard:
    """A shard whose codes have not all arrived."""

    def __init__(self, records: int):
        self.missing = records
        self.headers: list[dict[str, Any]] = [{}] * records
        self.payloads = [b""] * records


def _encode(
    job: Job,
    images: ImageShards,
    shards: Sequence[Shard],
    todo: Sequence[int],
    views: Views,
    encoder: BinaryTokenizer,
    records: int,
    workers: int,
    show: Callable[[str], None],
) -> None:
    starts = np.cumsum([0] + [shard.records for shard in shards])
    numbers = [n for unit in todo for n in range(starts[unit], starts[unit + 1])]
    # Where in its shard each picture is: workers may hand them over in another order.
    places = [(unit, row) for unit in todo for row in range(shards[unit].records)]
    open_shards: dict[int, _PartialShard] = {}
    done, begin = 0, time.perf_counter()

    def arrive(batch: dict[str, Any], packed: jax.Array) -> None:
        nonlocal done
        rows = np.asarray(packed)[: len(batch["index"]) * views.count]
        rows = rows.reshape(len(batch["index"]), views.count, -1)
        for index, header, code in zip(batch["index"], batch["header"], rows, strict=True):
            unit, row = places[int(index)]
            shard = open_shards.setdefault(unit, _PartialShard(shards[unit].records))
            shard.headers[row] = json.loads(header)
            shard.payloads[row] = b"" if "dropped" in shard.headers[row] else code.tobytes()
            shard.missing -= 1
            if not shard.missing:
                _write(job, unit, open_shards.pop(unit))
        done += len(rows)
        rate = done / max(time.perf_counter() - begin, 1e-6)
        show(f"{done}/{len(numbers)} pictures  {rate:.0f} pictures/s, compiling included")

    loader = make_loader(
        _Views(images, numbers, views),
        batch_size=records,
        seed=0,
        shuffle=False,
        repeat=False,
        workers=workers,
    )
    pending: tuple[dict[str, Any], jax.Array] | None = None
    with contextlib.closing(loader):
        for batch in loader:
            views_of_all = batch["image"].reshape(-1, *batch["image"].shape[2:])
            # The last batch is filled up, so that all have the compiled shape.
            packed = encoder.dispatch_encode(views_of_all, records * views.count)
            # The devices work on this batch while the one before it is written.
            if pending is not None:
                arrive(*pending)
            pending = batch, packed
        if pending is not None:
            arrive(*pending)


def _write(job: Job, unit: int, shard: _PartialShard) -> None:
    dropped = [header for header in shard.headers if "dropped" in header]
    # Records of a shard that cannot be read have one reason together.
    for reason in dict.fromkeys(header["dropped"] for header in dropped):
        logger.warning("no code for a picture: %s", reason)
    with job.writer(unit) as writer:
        for header, payload in zip(shard.headers, shard.payloads, strict=True):
            header.pop("size", None)
            writer.write(header, payload)
    records = len(shard.headers)
    result = {
        "kept": records - len(dropped),
        "dropped": len(dropped),
        "examples": [header["dropped"] for header in dropped[:5]],
    }
    job.finish(unit, records, result)
