"""Pictures as the bytes of files, which say how they were made."""

import io
from collections.abc import Mapping
from typing import Any

import numpy as np

from instella_jax.sampling.records import as_texts

FORMATS = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}


def encode(
    picture: np.ndarray, record: Mapping[str, Any] | None, kind: str = "png", quality: int = 95
) -> bytes:
    """Return a picture, uint8 [height, width, 3], as the bytes of a file.

    Args:
      picture: the picture.
      record: how it was made, which a PNG carries, so that `instella-jax generate --from` makes
        it again; None for a picture that is not finished.
      kind: one of `FORMATS`.
      quality: of JPEG and WebP, from 0 to 100.
    """
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    options: dict[str, Any] = {"quality": quality}
    if kind == "png":
        info = PngInfo()
        for keyword, text in as_texts(record).items() if record else ():
            info.add_itxt(keyword, text)
        options = {"pnginfo": info}
    file = io.BytesIO()
    Image.fromarray(picture).save(file, format=kind, **options)
    return file.getvalue()
