"""Features of sets of pictures, on all devices of all processes, and their cached statistics."""

import dataclasses
import hashlib
import json
import logging
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from instella_jax.evaluation.frechet import Statistics
from instella_jax.evaluation.inception import SIDE, WIDTH, inception_features, load_inception
from instella_jax.evaluation.picture_sets import PictureSet, batches, clean_resize, tf1_resize
from instella_jax.losses.perceptual import load_lpips, vgg_features
from instella_jax.runtime import sharding
from instella_jax.runtime.compile_cache import cache_folder
from instella_jax.runtime.digest import digest
from instella_jax.runtime.files import replacing

logger = logging.getLogger(__name__)

# Of what the statistics are; another number makes cached ones useless.
_VERSION = 1
# Pixels of a side that VGG16 was trained at.
_VGG_SIDE, _VGG_WIDTH = 224, 512


@dataclasses.dataclass(frozen=True)
class Extractor:
    """A network that makes features.

    Attributes:
      name: of the distance that is taken in them.
      width: d.
      prepare: makes what the network takes of uint8 [h, w, 3].
      apply: (params, [n, ...]) -> [n, d].
      params: of the network.
      settings: all that decides the features beside the pictures.
    """

    name: str
    width: int
    prepare: Callable[[np.ndarray], np.ndarray]
    apply: Callable[[Any, jax.Array], jax.Array]
    params: Any
    settings: dict[str, str]


def inception_extractor(weights: Path, resize: str = "tf1") -> Extractor:
    """Return that of FID.

    Args:
      weights: see `load_inception`.
      resize: "tf1", bilinear without antialiasing, or "clean", clean-fid's.

    Raises:
      UserError: the weights cannot be read.
    """
    how = {"tf1": tf1_resize, "clean": clean_resize}[resize]
    return Extractor(
        "fid",
        WIDTH,
        lambda image: how(image, SIDE),
        inception_features,
        load_inception(weights),
        {"features": "inception_v3_fid", "resize": resize, "weights": digest(weights)},
    )


def vgg_extractor(weights: str = "") -> Extractor:
    """Return that of the Frechet distance of VGG16 features, which is no FID.

    The features are the means over places of the last feature maps, of pictures resized to 224.

    Args:
      weights: see `load_lpips`.

    Raises:
      UserError: the weights cannot be read.
    """
    params = load_lpips(weights)
    leaves = jax.tree.leaves(params["vgg"])
    whole = hashlib.sha256(b"".join(np.asarray(leaf).tobytes() for leaf in leaves)).hexdigest()
    return Extractor(
        "vgg_frechet_distance",
        _VGG_WIDTH,
        lambda image: clean_resize(image, _VGG_SIDE) / 127.5 - 1,
        lambda params, images: vgg_features(params, images)[-1].mean((1, 2)),
        params,
        {"features": "vgg16_last_maps", "resize": "clean", "weights": whole[:32]},
    )


@dataclasses.dataclass(frozen=True)
class Measured:
    """What is known of a set of pictures.

    Attributes:
      statistics: of its features.
      features: float32 [n, d], None where they were not kept.
    """

    statistics: Statistics
    features: np.ndarray | None = None


def measure(
    pictures: PictureSet,
    extractor: Extractor,
    *,
    keep: bool = False,
    batch_size: int = 32,
    cache: Path | None = None,
    show: Callable[[int, int], None] = lambda done, total: None,
) -> Measured:
    """Return statistics of the features of pictures, those of all processes.

    Args:
      pictures: the whole set, in every process.
      extractor: the network.
      keep: whether the features are returned too.
      batch_size: pictures at a time in each process.
      cache: folder of earlier results, by pictures and settings; None for none.
      show: is given how many pictures of this process are done, of how many.
    """
    key = {"version": _VERSION, "names": list(pictures.names), **extractor.settings}
    name = hashlib.sha256(json.dumps(key).encode("utf-8", "surrogatepass")).hexdigest()[:32]
    path = cache / f"{name}.npz" if cache is not None else None
    known = _read(path, keep) if path is not None and jax.process_index() == 0 else None
    if _first_says(known is not None):
        return known or Measured(Statistics.empty(extractor.width))
    mesh = sharding.make_mesh({"data": -1, "fsdp": 1, "tensor": 1}, jax.local_devices())
    size = -(-batch_size // mesh.size) * mesh.size
    params = jax.device_put(extractor.params, sharding.replicated(mesh))
    apply = jax.jit(extractor.apply)
    part, of = jax.process_index(), jax.process_count()
    total = len(range(part, len(pictures), of))
    statistics, kept = Statistics.empty(extractor.width), []
    for batch in batches(pictures, extractor.prepare, size, part, of):
        # The last batch is filled up, so that all have the compiled shape.
        full = np.pad(batch, ((0, size - len(batch)), *((0, 0),) * (batch.ndim - 1)))
        placed = jax.device_put(jnp.asarray(full, jnp.float32), sharding.batch_sharding(mesh))
        features = np.asarray(apply(params, placed))[: len(batch)]
        statistics.add(features)
        if keep:
            kept.append(features)
        show(statistics.count, total)
    whole = Statistics.empty(extractor.width)
    for count, mean, scatter in zip(
        of_all(np.array([statistics.count])),
        of_all(statistics.mean),
        of_all(statistics.scatter),
        strict=True,
    ):
        whole.merge(Statistics(int(count[0]), mean, scatter))
    features = None
    if keep:
        own = np.concatenate(kept) if kept else np.zeros((0, extractor.width), np.float32)
        features = np.concatenate(of_all(own))
    found = Measured(whole, features)
    if path is not None and jax.process_index() == 0:
        _keep(path, found)
    return found


def default_cache() -> Path | None:
    """Return where statistics are kept: beside the compiled programs."""
    folder = cache_folder()
    return folder.parent / "statistics" if folder else None


def _read(path: Path, keep: bool) -> Measured | None:
    if not path.exists():
        return None
    try:
        # numpy would leave a damaged file open.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            statistics = Statistics(int(arrays["count"]), arrays["mean"], arrays["scatter"])
            features = arrays["features"] if "features" in arrays else None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        logger.warning("cached statistics %s are damaged and made anew (%s)", path, error)
        return None
    return None if keep and features is None else Measured(statistics, features)


def _keep(path: Path, found: Measured) -> None:
    values = {"count": found.statistics.count, "mean": found.statistics.mean}
    values["scatter"] = found.statistics.scatter
    if found.features is not None:
        values["features"] = found.features
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with replacing(path) as scratch, scratch.open("wb") as file:
            np.savez(file, **values)
    except OSError as error:
        logger.warning("statistics are not kept for another time: %s", error)


def _first_says(value: bool) -> bool:
    if jax.process_count() == 1:
        return value
    from jax.experimental import multihost_utils

    return bool(multihost_utils.broadcast_one_to_all(np.array(value)))


def of_all(array: np.ndarray) -> list[np.ndarray]:
    """Return the arrays of all processes, which may differ in their first size, bit for bit."""
    if jax.process_count() == 1:
        return [array]
    from jax.experimental import multihost_utils

    # As bytes: jax would round float64.
    data = np.frombuffer(np.ascontiguousarray(array).tobytes(), np.uint8)
    sizes = np.asarray(multihost_utils.process_allgather(np.array(len(data), np.uint32)))
    padded = np.pad(data, (0, int(sizes.max()) - len(data)))
    rows = np.asarray(multihost_utils.process_allgather(padded))
    shape = (-1, *array.shape[1:])
    return [
        np.frombuffer(row[:size].tobytes(), array.dtype).reshape(shape)
        for row, size in zip(rows, sizes.reshape(-1), strict=True)
    ]
