"""Pictures as the bytes of files, which say how they were made."""

import io
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

FORMATS = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}


def encode(
    picture: np.ndarray, made_by: Mapping[str, Any], kind: str = "png", quality: int = 95
) -> bytes:
    """Return a picture, uint8 [height, width, 3], as the bytes of a file.

    Args:
      picture: the picture.
      made_by: prompt, seed and settings, which a PNG carries as its text "instella_jax".
      kind: one of `FORMATS`.
      quality: of JPEG and WebP, from 0 to 100.
    """
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    options: dict[str, Any] = {"quality": quality}
    if kind == "png":
        info = PngInfo()
        info.add_itxt("instella_jax", json.dumps(dict(made_by), ensure_ascii=False))
        options = {"pnginfo": info}
    file = io.BytesIO()
    Image.fromarray(picture).save(file, format=kind, **options)
    return file.getvalue()


def made_by(settings: Any, row: Any) -> dict[str, Any]:
    """Return what a picture's file says of how it was made."""
    import dataclasses

    return {**dataclasses.asdict(row), **dataclasses.asdict(settings)}
