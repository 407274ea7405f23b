"""The sizes of a shard's pictures, in a file beside it: no picture need be read to learn them."""

import io
import logging
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from instella_jax.data.samples import BadSample
from instella_jax.runtime.files import write_bytes

logger = logging.getLogger(__name__)


def sizes_path(shard: Path) -> Path:
    """Return the path of the sizes of a shard."""
    return shard.with_suffix(".sizes.npy")


def write_sizes(shard: Path, sizes: Sequence[Sequence[int] | None]) -> None:
    """Write width and height of each picture of a shard, if all are known.

    Args:
      shard: path of the shard.
      sizes: one for each record.
    """
    if None in sizes:
        return
    file = io.BytesIO()
    np.save(file, np.array(sizes, np.int32))
    write_bytes(sizes_path(shard), file.getvalue())


def read_sizes(
    shard: Path, numbers: Sequence[int], header: Callable[[int], dict[str, Any]]
) -> np.ndarray:
    """Read width and height of each picture of a shard.

    Args:
      shard: path of the shard.
      numbers: of its records.
      header: reads the header of a record, where there is no file of sizes.

    Returns:
      int32 [n, 2]; 0 where a record is damaged.
    """
    path = sizes_path(shard)
    try:
        sizes = np.load(path, allow_pickle=False)
        if sizes.shape == (len(numbers), 2) and sizes.dtype == np.int32:
            return sizes
        reason = "it does not fit the shard"
    except (OSError, ValueError, EOFError) as error:
        reason = getattr(error, "strerror", None) or str(error)
    logger.warning("no use of %s (%s): all of the shard is read for its sizes", path, reason)

    def size(number: int) -> Sequence[int]:
        try:
            return header(number).get("size") or (0, 0)
        except BadSample:
            return 0, 0

    with ThreadPoolExecutor(min(8, 2 * (os.cpu_count() or 1))) as pool:
        return np.array(list(pool.map(size, numbers)), np.int32)
