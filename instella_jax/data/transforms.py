"""Crop, resize and flip: pictures of any size to pictures of one size.

A transform is called with (sample, rng) and changes "image", uint8 [h, w, 3], to uint8
[height, width, 3], and "texts", one or more captions, to "text", one of them.
"""

from typing import Any

import numpy as np


class TrainTransform:
    """Random crop and flip, and one of the captions at random.

    The crop has the target's aspect ratio and keeps 80 to 100 % of the side that limits it; its
    size and place are uniform.
    """

    def __init__(self, height: int, width: int, *, min_keep: float = 0.8, flip: float = 0.5):
        """Remember the target size in pixels.

        Args:
          height: Of the result.
          width: Of the result.
          min_keep: The smallest part of the limiting side that is kept, in (0, 1].
          flip: Probability of a mirror image; 0 where captions speak of left and right.
        """
        if not 0 < min_keep <= 1 or not 0 <= flip <= 1:
            raise ValueError(f"min_keep must be in (0, 1], flip in [0, 1]; got {min_keep}, {flip}")
        self._size, self._min_keep, self._flip = (height, width), min_keep, flip

    def __call__(self, sample: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        """Return the sample with "image" and "text" made ready."""
        # Always four numbers, so that the options do not change the random stream of a picture.
        keep, x, y, mirror = rng.random(4)
        scale = self._min_keep + (1 - self._min_keep) * keep
        image = crop_resize(sample["image"], *self._size, scale=scale, x=x, y=y)
        if mirror < self._flip:
            image = np.ascontiguousarray(image[:, ::-1])
        return with_text({**sample, "image": image}, rng)


class EvalTransform:
    """The largest crop from the centre, and the first caption."""

    def __init__(self, height: int, width: int):
        self._size = (height, width)

    def __call__(self, sample: dict[str, Any], rng: np.random.Generator | None = None) -> Any:
        """Return the sample with "image" and "text" made ready."""
        return with_text({**sample, "image": crop_resize(sample["image"], *self._size)}, None)


def with_text(sample: dict[str, Any], rng: np.random.Generator | None) -> dict[str, Any]:
    """Return the sample with "text", one of its "texts": the first without `rng`."""
    texts = sample.pop("texts", None)
    if texts is not None:
        index = 0 if rng is None or len(texts) == 1 else int(rng.integers(len(texts)))
        sample["text"] = texts[index]
    return sample


def crop_resize(
    image: np.ndarray,
    height: int,
    width: int,
    *,
    scale: float = 1.0,
    x: float = 0.5,
    y: float = 0.5,
) -> np.ndarray:
    """Cut a box of the target's aspect ratio out of a picture and resize it (antialiased bicubic).

    Args:
      image: uint8 [h, w, 3].
      height: Of the result, in pixels.
      width: Of the result, in pixels.
      scale: Size of the box, in (0, 1], 1 being the largest that fits.
      x: Place of the box, from 0 (left) to 1 (right).
      y: Place of the box, from 0 (top) to 1 (bottom).

    Returns:
      uint8 [height, width, 3].
    """
    rows, columns = image.shape[:2]
    box_width = scale * min(columns, rows * width / height)
    box_height = box_width * height / width
    left, top = x * (columns - box_width), y * (rows - box_height)
    # Rounding may put the far edge a hair outside, which Pillow refuses.
    box = (left, top, min(left + box_width, columns), min(top + box_height, rows))
    return resize(image, height, width, box)


def resize(
    image: np.ndarray,
    height: int,
    width: int,
    box: tuple[float, float, float, float] | None = None,
) -> np.ndarray:
    """Resize a picture uint8 [h, w, 3], or a box of it (left, top, right, bottom): uint8.

    Antialiased bicubic.
    """
    from PIL import Image

    if box is None and image.shape[:2] == (height, width):
        return image
    resized = Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC, box)
    return np.asarray(resized)
