"""Compressed files, told by their first bytes, as streams that can be read again from any place."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
from collections.abc import Callable
from typing import IO, Any

_AT_ONCE = 2**20  # bytes that are skipped at a time


def decompressed(file: IO[bytes]) -> IO[bytes]:
    """Return a stream of what is in a compressed file; the file itself if it is not compressed.

    Args:
      file: a file on disk, at its beginning. Going backwards in the stream reads it anew.
    """
    start = file.read(8)
    file.seek(0)
    opened = next((o for magic, o in _KINDS.items() if start.startswith(magic)), None)
    return opened(file) if opened else file


class _Zstandard(io.RawIOBase):
    """A file that zstd compressed, which can be read again from any place; backwards is slow."""

    def __init__(self, path: str):
        self._path, self._place = path, 0
        self._stream = self._begin()

    def _begin(self) -> Any:
        import pyarrow

        return pyarrow.input_stream(self._path, compression="zstd")

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def readinto(self, buffer: Any) -> int:
        data = self._stream.read(len(buffer))
        buffer[: len(data)] = data
        self._place += len(data)
        return len(data)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a place, counted from the beginning or from here."""
        place = offset + (self._place if whence == io.SEEK_CUR else 0)
        if place < self._place:
            self._stream.close()
            self._stream, self._place = self._begin(), 0
        while self._place < place and (
            data := self._stream.read(min(place - self._place, _AT_ONCE))
        ):
            self._place += len(data)
        return self._place

    def close(self) -> None:
        self._stream.close()
        super().close()


# zstd's own frames, and those that pzstd has before them.
_FRAMES = (b"\x28\xb5\x2f\xfd", *(bytes([0x50 + n]) + b"\x2a\x4d\x18" for n in range(16)))
_KINDS: dict[bytes, Callable[[Any], Any]] = {
    b"\x1f\x8b": lambda file: gzip.GzipFile(fileobj=file),
    b"BZh": bz2.BZ2File,
    b"\xfd7zXZ\0": lzma.LZMAFile,
    **dict.fromkeys(_FRAMES, lambda file: io.BufferedReader(_Zstandard(file.name))),
}
