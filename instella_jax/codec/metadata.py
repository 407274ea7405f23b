"""What a file of bits keeps of a picture's EXIF: who made it, when, and what it says of itself.

Where it was taken, the camera and its settings, and thumbnails are left out.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from instella_jax.data.images import open_picture
from instella_jax.runtime.files import printable

_DESCRIPTION, _DATE, _ARTIST, _COPYRIGHT = 0x010E, 0x0132, 0x013B, 0x8298
_PHOTO, _DATE_TAKEN = 0x8769, 0x9003
MOST_LETTERS = 1_000


def kept_metadata(path: str | os.PathLike[str]) -> bytes:
    """Return an EXIF block with description, date, artist and copyright of a picture, or nothing.

    Raises:
      BadPicture: the picture cannot be read; damaged EXIF is no reason.
    """
    from PIL import Image

    with open_picture(Path(path), printable(path)) as image:
        kept = Image.Exif()
        with contextlib.suppress(Exception):  # damaged entries make Pillow raise all kinds
            found = Image.Image.getexif(image)
            taken = found.get_ifd(_PHOTO).get(_DATE_TAKEN)
            values = {tag: found.get(tag) for tag in (_DESCRIPTION, _DATE, _ARTIST, _COPYRIGHT)}
            values[_DATE] = taken or values[_DATE]
            for tag, value in values.items():
                if isinstance(value, str) and (text := value.strip("\0 \r\n")):
                    kept[tag] = text[:MOST_LETTERS]
        return kept.tobytes() if len(kept) else b""
