"""Pictures on disk: PNG files, and grids with a caption under each picture."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from instella_jax.runtime.files import replacing

if TYPE_CHECKING:
    from PIL import ImageFont

_MARGIN = 6
# Grey paper, so that a white picture has an edge.
_PAPER, _INK = (232, 232, 232), (20, 20, 20)
_MAX_LINES = 8
# A cell this wide holds a few words of caption on a line.
_READABLE = 128


def save_png(
    path: str | os.PathLike[str], picture: np.ndarray, texts: Mapping[str, str] | None = None
) -> None:
    """Write a picture, uint8 [H, W, 3], as PNG, whole or not at all; folders are made.

    Args:
      path: of the file.
      picture: its pixels.
      texts: what the file says beside the picture, by keyword (iTXt chunks).
    """
    from PIL import Image, PngImagePlugin

    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[-1] != 3:
        raise ValueError(f"expected uint8 [H, W, 3]; got {picture.dtype} {list(picture.shape)}")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    chunks = PngImagePlugin.PngInfo()
    for keyword, text in (texts or {}).items():
        chunks.add_itxt(keyword, text)
    with replacing(path) as scratch:
        Image.fromarray(picture).save(scratch, format="PNG", pnginfo=chunks)


def draw_grid(
    images: np.ndarray, captions: Sequence[str] | None = None, together: int = 1
) -> np.ndarray:
    """Return pictures in rows, about as many as columns, each with its caption wrapped under it.

    Narrow pictures are enlarged by a whole number, so that captions can be read.

    Args:
      images: uint8 [n, h, w, 3], n >= 1.
      captions: n texts, or None.
      together: how many pictures, one after the other, stay in one row.

    Returns:
      uint8 [H, W, 3].

    Raises:
      ValueError: the shapes or numbers do not fit.
    """
    from PIL import Image, ImageDraw, ImageFont

    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3 or not len(images):
        raise ValueError(f"expected uint8 [n, h, w, 3]; got {images.dtype} {list(images.shape)}")
    n, height, width = images.shape[:3]
    labels = [""] * n if captions is None else list(captions)
    if len(labels) != n:
        raise ValueError(f"{n} pictures, but {len(labels)} captions")
    across = min(n, together * math.ceil(math.sqrt(n) / together))
    zoom = max(1, math.ceil(_READABLE / width))
    big = images.repeat(zoom, axis=1).repeat(zoom, axis=2)
    height, width = height * zoom, width * zoom

    font = ImageFont.load_default(12 if width < 384 else 18)
    texts = [_wrap(caption, width, font) for caption in labels]
    line_height = sum(_metrics(font))
    rows = [range(start, min(start + across, n)) for start in range(0, n, across)]
    text_heights = [max(len(texts[i]) for i in row) * line_height for row in rows]
    sheet = Image.new(
        "RGB",
        (
            across * (width + _MARGIN) + _MARGIN,
            sum(text_heights) + len(rows) * (height + 2 * _MARGIN) + _MARGIN,
        ),
        _PAPER,
    )
    pen = ImageDraw.Draw(sheet)
    top = _MARGIN
    for row, text_height in zip(rows, text_heights, strict=True):
        for column, i in enumerate(row):
            left = _MARGIN + column * (width + _MARGIN)
            sheet.paste(Image.fromarray(big[i]), (left, top))
            for number, line in enumerate(texts[i]):
                below = top + height + _MARGIN // 2 + number * line_height
                pen.text((left, below), line, fill=_INK, font=font)
        top += height + text_height + 2 * _MARGIN
    return np.asarray(sheet)


def save_grid(
    path: str | os.PathLike[str],
    images: np.ndarray,
    captions: Sequence[str] | None = None,
    together: int = 1,
) -> np.ndarray:
    """Write `draw_grid` of the same arguments as PNG, and return it."""
    grid = draw_grid(images, captions, together)
    save_png(path, grid)
    return grid


def _metrics(font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> tuple[int, int]:
    left, top, right, bottom = font.getbbox("Agjq")
    return math.ceil(bottom), math.ceil(0.25 * (bottom - top))


def _wrap(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> list[str]:
    """Return break `text` at spaces, and inside a word where it must be, into lines of <= width
    pixels."""
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] = f"{lines[-1]} {word}"
            continue
        while len(word) > 1 and font.getlength(word) > width:
            fits = (i for i in range(len(word) - 1, 1, -1) if font.getlength(word[:i]) <= width)
            cut = next(fits, 1)
            lines.append(word[:cut])
            word = word[cut:]
        lines.append(word)
    if len(lines) > _MAX_LINES:
        last = lines[_MAX_LINES - 1]
        while last and font.getlength(last + " ...") > width:
            last = last[:-1]
        lines = [*lines[: _MAX_LINES - 1], last.rstrip() + " ..."]
    return lines
