"""Webdataset shards: tar files in which neighbours of one name are a picture and what goes with it.

`000123.jpg`, `000123.txt` (a caption) and `000123.json` (captions and columns) are one sample. A
damaged tar is read past the damage, as far as there are headers to go by.
"""

from __future__ import annotations

import lzma
import os
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

from instella_jax.data.samples import BadSample
from instella_jax.errors import UserError
from instella_jax.preparing.items import MAX_BYTES, Item, Problem, captions, read_json

_IMAGES = ("jpg", "jpeg", "png", "webp")
_BROKEN = (tarfile.TarError, OSError, EOFError, zlib.error, lzma.LZMAError, ValueError)
_BLOCK = tarfile.BLOCKSIZE
_DAMAGED = "damaged tar"


def read_tar(path: str, keys: Sequence[str]) -> Iterator[Item | Problem]:
    """Yield the samples of a tar file, compressed or not.

    Args:
      path: of the file.
      keys: JSON keys that captions are in.

    Raises:
      UserError: the file is not there.
    """
    sample: dict[str, bytes] = {}
    current = ""
    for name, value in _members(path):
        folder, base = os.path.split(name)
        stem, _, kind = base.partition(".")
        key = os.path.join(folder, stem)
        if key != current:
            if sample:
                yield _sample(current, sample, keys)
            current, sample = key, {}
        if isinstance(value, str):
            yield Problem(name, value, of_file=value == _DAMAGED)
        elif kind.lower() in (*_IMAGES, "txt", "json"):
            sample[kind.lower()] = value
    if sample:
        yield _sample(current, sample, keys)


def _sample(name: str, parts: dict[str, bytes], keys: Sequence[str]) -> Item | Problem:
    image = next((parts[kind] for kind in _IMAGES if kind in parts), None)
    try:
        meta = read_json(parts["json"]) if "json" in parts else {}
        texts = captions({"txt": parts.get("txt")}, ("txt",)) + captions(meta, keys)
    except BadSample as reason:
        return Problem(name, str(reason))
    return Item(name, image, tuple(dict.fromkeys(texts)), meta)


def _members(path: str) -> Iterator[tuple[str, bytes | str]]:
    """Yield (name, content), or (name, what is wrong)."""
    end = 0
    try:
        # ignore_zeros: without it a damaged header would be taken for the end of the file.
        with tarfile.open(path, "r:*", ignore_zeros=True) as tar:
            while (member := tar.next()) is not None:
                if not _zeros(tar, end, member.offset):
                    yield f"{path} at byte {end}", _DAMAGED
                end = member.offset_data + -(-member.size // _BLOCK) * _BLOCK
                if not member.isreg():
                    end = member.offset_data
                elif member.size > MAX_BYTES:
                    yield member.name, "file too large"
                else:
                    file = tar.extractfile(member)
                    content = file.read() if file else b""
                    if len(content) < member.size:
                        yield f"{path} at byte {member.offset}", _DAMAGED
                        return
                    yield member.name, content
            if not _zeros(tar, end, None):
                yield f"{path} at byte {end}", _DAMAGED
    except FileNotFoundError:
        raise UserError(f"{path} does not exist any more; give the input as it was") from None
    except _BROKEN:
        yield f"{path} after byte {end}", _DAMAGED


def _zeros(tar: tarfile.TarFile, start: int, stop: int | None) -> bool:
    """Return whether there is nothing but zeros between two members, or from the last one to the
    end.

    At the end there must be a block of them, the mark of a tar that was written to its end.
    """
    file: Any = tar.fileobj
    if start == stop:
        return True
    file.seek(start)
    if stop is not None:
        return not any(file.read(stop - start))
    total = 0
    while chunk := file.read(2**20):
        if any(chunk):
            return False
        total += len(chunk)
    return total >= _BLOCK
