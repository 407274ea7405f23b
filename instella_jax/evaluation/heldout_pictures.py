"""Pictures to measure a tokenizer on: held-out scenes, or those of a folder."""

import contextlib
import os
from collections.abc import Iterator

import numpy as np

from instella_jax.data.folder import FolderSource
from instella_jax.data.loader import make_loader
from instella_jax.data.scenes.source import EmojiScenes
from instella_jax.data.transforms import EvalTransform

SCENES = "scenes"


def open_pictures(
    source: str | os.PathLike[str], side: int, batch_size: int, count: int = 0
) -> Iterator[np.ndarray]:
    """Yield pictures as training sees held-out ones, the largest square from the centre.

    Args:
      source: a folder, or "scenes": the held-out ones of the demo.
      side: of the results in pixels.
      batch_size: pictures at a time, at most.
      count: how many; 0: 512 scenes, or all of the folder.

    Yields:
      uint8 [B, side, side, 3]. Pictures that cannot be read are left out, and logged.

    Raises:
      UserError: the folder holds no pictures.
    """
    scenes = os.fspath(source) == SCENES
    if scenes:
        # The world of the demo's configs.
        pictures = EmojiScenes(side, split="heldout", places="thirds", length=count or 512)
    else:
        pictures = FolderSource(source, captions=False, decode_side=side)
    loader = make_loader(
        pictures,
        batch_size=batch_size,
        seed=0,
        shuffle=False,
        repeat=False,
        threads=0 if scenes else None,
        transform=EvalTransform(side, side),
    )
    left = count or len(pictures)
    with contextlib.closing(loader):
        for batch in loader:
            yield batch["image"][:left]
            left -= len(batch["image"])
            if left <= 0:
                return
