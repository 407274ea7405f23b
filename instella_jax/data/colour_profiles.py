"""Colours as a person sees them: pictures with a colour profile, in sRGB.

Transforms are kept by the bytes of the profiles, as the pictures of a data set share a few.
"""

from __future__ import annotations

import functools
import io
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from PIL import Image

# The modes that pictures may have for profiles of these colour spaces.
_MODES = {"RGB": ("RGB", "L"), "GRAY": ("L",), "CMYK": ("CMYK",)}
# Profiles that move no colour by more levels than this are sRGB, in one of its many spellings.
_SRGB_LEVELS = 2


class BrokenProfile(Exception):
    """Raised for a colour profile that cannot be used."""


def to_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    """Convert a picture without transparency to sRGB.

    Args:
      image: of mode L, RGB or CMYK.
      profile: ICC profile of the picture.

    Returns:
      The picture, as it is where its profile is that of sRGB.

    Raises:
      BrokenProfile: the profile is damaged or for other colours than the picture has.
    """
    space, transform = _transform(profile)
    if image.mode not in _MODES.get(space, ()):
        raise BrokenProfile
    if transform is None:
        return image
    mode = {"GRAY": "L"}.get(space, space)
    from PIL import ImageCms

    result = ImageCms.applyTransform(image.convert(mode), transform)
    assert result is not None
    return result


@functools.lru_cache(maxsize=64)
def _transform(profile: bytes) -> tuple[str, Any]:
    """Return the colour space of a profile and its transform to sRGB; ("", None) if broken.

    The transform is None where it would change nothing.
    """
    from PIL import ImageCms

    try:
        source: Any = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        space = source.profile.xcolor_space.strip()
        if space not in _MODES:
            return "", None
        mode = "L" if space == "GRAY" else space
        transform = ImageCms.buildTransform(
            source, ImageCms.createProfile("sRGB"), mode, "RGB", ImageCms.Intent.PERCEPTUAL
        )
    except (ImageCms.PyCMSError, OSError, TypeError, ValueError):
        return "", None
    return space, None if mode != "CMYK" and _changes_nothing(transform, mode) else transform


def _changes_nothing(transform: Any, mode: str) -> bool:
    """Return whether colours stay as they are, tried on a grid of them."""
    from PIL import Image, ImageCms

    steps = np.arange(0, 256, 17, dtype=np.uint8)
    if mode == "L":
        before = Image.fromarray(steps[None])
    else:
        grid = np.stack(np.meshgrid(steps, steps, steps), axis=-1).reshape(1, -1, 3)
        before = Image.fromarray(grid)
    after = ImageCms.applyTransform(before, transform)
    assert after is not None
    change = np.asarray(after, int) - np.asarray(before.convert("RGB"), int)
    return bool(np.abs(change).max() <= _SRGB_LEVELS)
