"""Tell a JPEG file that lacks only its end marker from one that was cut off.

libjpeg fills blocks that are missing with grey and only warns, which Pillow does not pass on. But
bytes behind a whole scan change nothing, and those at its end belong to its last blocks.
"""

from __future__ import annotations

import io
import random
import re

import numpy as np

END = b"\xff\xd9"
_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")  # neither a stuffed byte nor a restart
_START_OF_SCAN = 0xDA
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_PROGRESSIVE = 0xC2
# What is decoded in place of blocks that are not there; no byte of it begins a marker.
_NOISE = bytes(random.Random(0).randrange(255) for _ in range(64))
_LAST = 8  # bytes that surely hold something of the last blocks


def end_of(data: bytes) -> int | None:
    """Return where the end marker of the picture in a JPEG file is, None where it has none."""
    return _walk(data)[0]


def with_end(data: bytes) -> bytes | None:
    """Return a JPEG file with its end marker if that is all it lacks, else None."""
    end, complete = _walk(data)
    if end is not None or not complete:
        return None
    body = data.removesuffix(b"\xff")
    if len(set(body[-_LAST:])) == 1:  # room made for a download that did not arrive
        return None
    try:
        whole = _decode(body + END)
        same = np.array_equal(whole, _decode(body + _NOISE + END))
        needed = not np.array_equal(whole, _decode(body[:-_LAST] + _NOISE + END))
    except Exception:  # Pillow's decoders raise all kinds on broken files
        return None
    return body + END if same and needed else None


def _decode(data: bytes) -> np.ndarray:
    from PIL import Image

    with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
        return np.asarray(image)


def _walk(data: bytes) -> tuple[int | None, bool]:
    """Go over the markers of a JPEG file.

    Returns:
      The position of the end marker, and whether the scans before it code every coefficient of
      every component down to its last bit, as far as their headers say.
    """
    frame: set[tuple[int, int]] = set()  # (component, coefficient)
    coded: set[tuple[int, int]] = set()
    end, position = None, 2
    while end is None and (found := _MARKER.search(data, position)):
        kind, start = data[found.end() - 1], found.end()
        part = data[start + 2 : start + int.from_bytes(data[start : start + 2])]
        position = start + 2 + len(part)
        if kind == END[1]:
            end = found.start()
        elif kind in _FRAMES and len(part) > 5:
            count = 64 if kind == _PROGRESSIVE else 1
            frame = {(name, k) for name in part[6 : 6 + 3 * part[5] : 3] for k in range(count)}
        elif kind == _START_OF_SCAN and part and len(part) >= 4 + 2 * part[0]:
            first, last, bits = part[1 + 2 * part[0] :][:3]
            if not bits & 15:
                names = part[1 : 1 + 2 * part[0] : 2]
                coded |= {(name, k) for name in names for k in range(first, last + 1)}
    return end, bool(frame) and frame <= coded
