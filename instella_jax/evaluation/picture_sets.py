"""Sets of pictures to measure: a folder, or the numbers of an .npz file; cropped and resized."""

import dataclasses
import functools
import logging
import re
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from instella_jax.data.images import BadPicture, is_picture, read_picture
from instella_jax.data.transforms import crop_resize
from instella_jax.errors import UserError

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class PictureSet:
    """Pictures by number.

    Attributes:
      names: what tells one set from another: of each file its path, size and time of change.
      read: reads picture i as uint8 [h, w, 3].
      change: makes others of pictures [n, h, w, 3] that were read, all of one size.
    """

    names: Sequence[Any]
    read: Callable[[int], np.ndarray]
    change: Callable[[np.ndarray], np.ndarray] | None = None

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self.names)


def open_pictures(path: Path) -> PictureSet:
    """Open a folder of pictures, at any depth, or an .npz file with uint8 [n, h, w, 3].

    Raises:
      UserError: it is neither.
    """
    if path.is_dir():
        found = sorted(f for f in path.rglob("*") if is_picture(f.name) and f.is_file())
        files = [f for f in found if not _is_grid(f)]
        if len(found) > len(files):
            logger.warning(
                "%d grid(s) of samples in %s are left out", len(found) - len(files), path
            )
        if not files:
            raise UserError(f"{path} holds no pictures")
        return listed(files)
    if path.suffix == ".npz" and path.is_file():
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
                pictures = arrays["arr_0"] if "arr_0" in arrays else arrays[arrays.files[0]]
        except (OSError, ValueError, IndexError, EOFError, zipfile.BadZipFile) as error:
            raise UserError(f"{path} cannot be read as .npz ({error})") from None
        if pictures.dtype != np.uint8 or pictures.ndim != 4 or pictures.shape[-1] != 3:
            raise UserError(
                f"{path} holds {pictures.dtype} {list(pictures.shape)}: expected uint8 [n, h, w, 3]"
            )
        stamp = _stamp(path)
        return PictureSet([(*stamp, i) for i in range(len(pictures))], pictures.__getitem__)
    raise UserError(f"{path} is no folder of pictures and no .npz file")


def listed(files: Sequence[Path]) -> PictureSet:
    """Return the pictures of files."""
    return PictureSet([_stamp(f) for f in files], lambda i: _read(files[i]))


def _is_grid(path: Path) -> bool:
    """Return whether sampling has written a file beside the samples that it shows."""
    named = re.fullmatch(r"grid-\d{5,}\.png", path.name)
    return bool(named) and path.with_name("metadata.jsonl").exists()


def _read(path: Path) -> np.ndarray:
    try:
        return read_picture(path)
    except BadPicture as error:
        raise UserError(f"{error}; mend it or move it away") from None


def _stamp(path: Path) -> tuple[str, int, int]:
    found = path.stat()
    return str(path.resolve()), found.st_size, found.st_mtime_ns


def center_crop(pictures: PictureSet, side: int, kernel: str = "bicubic") -> PictureSet:
    """Return the largest square from the centre of each, resized to `side` with antialiasing.

    Args:
      pictures: of any sizes.
      side: in pixels.
      kernel: "bicubic", which is what the model sees, or "lanczos", as COCO-30k is measured.
    """
    if kernel == "bicubic":
        resize = functools.partial(crop_resize, height=side, width=side)
    else:
        resize = functools.partial(_lanczos, side=side)
    names = [(*name, side, kernel) for name in pictures.names]
    return PictureSet(names, lambda i: resize(pictures.read(i)))


def _lanczos(image: np.ndarray, side: int) -> np.ndarray:
    from PIL import Image

    rows, columns = image.shape[:2]
    least = min(rows, columns)
    left, top = (columns - least) // 2, (rows - least) // 2
    square = Image.fromarray(image[top : top + least, left : left + least])
    return np.asarray(square.resize((side, side), Image.Resampling.LANCZOS))


def batches(
    pictures: PictureSet, prepare: Callable[[np.ndarray], np.ndarray], size: int, part: int, of: int
) -> Iterator[np.ndarray]:
    """Yield the pictures of a part, prepared in threads: [size, ...], the last batch shorter.

    Args:
      pictures: all of them.
      prepare: makes what the network takes of uint8 [h, w, 3].
      size: of a batch.
      part: number of the part; its pictures are every `of`-th one.
      of: how many parts.
    """
    from concurrent.futures import ThreadPoolExecutor

    mine = range(part, len(pictures), of)
    with ThreadPoolExecutor() as pool:
        for start in range(0, len(mine), size):
            rows = mine[start : start + size]
            images = list(pool.map(pictures.read, rows))
            if pictures.change is not None:
                images = list(pictures.change(np.stack(images)))
            yield np.stack(list(pool.map(prepare, images)))


@functools.cache
def _tf1_matrix(source: int, target: int) -> np.ndarray:
    """Return weights [target, source] of TensorFlow 1's bilinear resize, without antialiasing."""
    place = np.arange(target) * (source / target)
    low = np.floor(place).astype(int)
    high = np.minimum(low + 1, source - 1)
    weights = np.zeros((target, source), np.float32)
    rows = np.arange(target)
    weights[rows, low] += 1 - (place - low)
    weights[rows, high] += place - low
    return weights


def tf1_resize(image: np.ndarray, side: int) -> np.ndarray:
    """Resize uint8 [h, w, 3] as the graph of FID's Inception does: float32 in [0, 255]."""
    rows, columns = (_tf1_matrix(n, side) for n in image.shape[:2])
    tall = np.tensordot(rows, image.astype(np.float32), axes=1)
    return np.moveaxis(np.tensordot(columns, tall, axes=(1, 1)), 0, 1)


def clean_resize(image: np.ndarray, side: int) -> np.ndarray:
    """Resize uint8 [h, w, 3] as clean-fid does: antialiased bicubic in float32, in [0, 255]."""
    from PIL import Image

    channels = [
        Image.fromarray(image[..., c].astype(np.float32)).resize(
            (side, side), Image.Resampling.BICUBIC
        )
        for c in range(3)
    ]
    return np.clip(np.stack([np.asarray(c) for c in channels], -1), 0, 255)
