"""Which pictures of a data set are kept, and why others are left out."""

import contextlib
import dataclasses
import io
import math
from collections.abc import Callable, Mapping
from typing import Any

from instella_jax.data import jpeg_damage
from instella_jax.data.images import TOO_LARGE, BadPicture, decode_picture, log_flaw, read_size
from instella_jax.errors import UserError
from instella_jax.preparing import readers
from instella_jax.preparing.items import NO_CAPTION, WATERMARK, Item


@dataclasses.dataclass(frozen=True)
class Filters:
    """What is kept (see "Published recipe" in docs/model.md).

    Attributes:
      min_side: the shorter side in pixels, at least; 0: any.
      max_watermark: score of a watermark ("pwatermark"), at most; pictures without one are kept.
      max_aspect: longer side over shorter side, at most; 0: any.
      captions: whether a picture needs a caption.
    """

    min_side: int = 0
    max_watermark: float = 0.5
    max_aspect: float = 0.0
    captions: bool = True

    def __post_init__(self) -> None:
        """Check ranges.

        Raises:
          UserError: a value is out of range.
        """
        if self.min_side < 0:
            raise UserError(f"--min-side is {self.min_side}: expected at least 0")
        if not 0 <= self.max_watermark <= 1:
            raise UserError(f"--max-watermark is {self.max_watermark:g}: expected 0 to 1")
        if self.max_aspect and not self.max_aspect >= 1:
            raise UserError(f"--max-aspect is {self.max_aspect:g}: expected 1 or more, or 0: any")


class LeftOut(Exception):
    """Raised with the reason why a picture is left out."""


def check_picture(
    item: Item, filters: Filters, on_flaw: Callable[[str], None] = log_flaw
) -> tuple[bytes, tuple[int, int]]:
    """Return the file and the size, width and height as shown, of a picture that is kept.

    `on_flaw` is given what is wrong with it all the same.

    Raises:
      LeftOut: with the reason why it is not.
    """
    from PIL import Image

    if item.image is None:
        raise LeftOut("no picture")
    if filters.captions and not item.texts:
        raise LeftOut(NO_CAPTION)
    if _watermark(item.meta) > filters.max_watermark:
        raise LeftOut("watermark")
    if len(item.image) > readers.MAX_BYTES:
        raise LeftOut("file too large")
    try:
        width, height = read_size(io.BytesIO(item.image), item.name)
    except BadPicture as error:
        raise LeftOut(error.reason) from None
    # By its header first: what is filtered out need not be decoded.
    if width * height > (Image.MAX_IMAGE_PIXELS or math.inf):
        raise LeftOut(TOO_LARGE)
    if min(width, height) < filters.min_side:
        raise LeftOut("too small")
    if filters.max_aspect and max(width, height) > filters.max_aspect * min(width, height):
        raise LeftOut("aspect ratio")
    try:
        # Damage shows at a fraction of the size too.
        decode_picture(io.BytesIO(item.image), item.name, decode_side=256, on_flaw=on_flaw)
    except BadPicture as error:
        raise LeftOut(error.reason) from None
    if item.image.startswith(jpeg_damage.START):
        if jpeg_damage.is_damaged(item.image):
            raise LeftOut(jpeg_damage.DAMAGED)
        if not jpeg_damage.can_check():
            on_flaw(jpeg_damage.NOT_CHECKED)
    return item.image, (width, height)


def _watermark(meta: Mapping[str, Any]) -> float:
    """Return the score of a watermark, 0 where there is none: null, NaN or no number."""
    for key, value in meta.items():
        if key.lower() == WATERMARK:
            with contextlib.suppress(TypeError, ValueError):
                score = float(value)
                return 0.0 if math.isnan(score) else score
    return 0.0
