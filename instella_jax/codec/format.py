"""The file format of a picture in bits; docs/formats.md has every offset."""

from __future__ import annotations

import dataclasses
import struct
import zlib

import numpy as np

from instella_jax.errors import UserError

SUFFIX = ".b1d"
MAGIC = b"\x89B1D"
VERSION = 1
# Bytes of the model's hash that a file has.
HASH_BYTES = 8
_HEADER = struct.Struct("<4sB8sHHBBHHHBBHH")
_CHECKSUM = struct.Struct("<I")
# The greatest value of each number, which is also the greatest that its bytes hold.
LIMITS = {
    "height": 1 << 16,
    "width": 1 << 16,
    "grid_rows": 1 << 8,
    "grid_columns": 1 << 8,
    "num_tokens": 1 << 16,
    "bits": 1 << 16,
    "stored": 1 << 16,
    "tile_rows": 1 << 8,
    "tile_columns": 1 << 8,
}
# Pictures are as large as `data.images` reads them.
MAX_PIXELS = 89_478_485


class BadCode(UserError):
    """Raised for a file of bits that cannot be used; the sentence does not name it."""


@dataclasses.dataclass(frozen=True)
class CodeFile:
    """What a file holds.

    Attributes:
      model: hash of the weights that made it, 16 hexadecimal digits.
      height: of the original picture in pixels, turned upright.
      width: likewise.
      grid_rows: rows of patches that each tile was encoded at.
      grid_columns: columns of them.
      num_tokens: N of the tokenizer.
      bits: K of the tokenizer.
      stored: how many of the N tokens are there, the first ones.
      tile_rows: rows of tiles that the picture was cut into.
      tile_columns: columns of them.
      overlap: pixels of the original by which a tile reaches into each neighbour.
      codes: of the tiles, row by row, uint8 [tiles, stored, K] of 0 and 1.
      metadata: an EXIF block, or nothing.
    """

    model: str
    height: int
    width: int
    grid_rows: int
    grid_columns: int
    num_tokens: int
    bits: int
    codes: np.ndarray
    stored: int
    tile_rows: int = 1
    tile_columns: int = 1
    overlap: int = 0
    metadata: bytes = b""

    def __post_init__(self) -> None:
        """Check ranges.

        Raises:
          BadCode: a number is out of the range that the format has, or does not fit another one.
        """
        for name, most in LIMITS.items():
            if not 1 <= getattr(self, name) <= most:
                raise BadCode(f"{name} is {getattr(self, name)}, the format holds 1 to {most:,}")
        if self.height * self.width > MAX_PIXELS:
            raise BadCode(f"{self.width}x{self.height} is over {MAX_PIXELS:,} pixels")
        if self.stored > self.num_tokens:
            raise BadCode(f"{self.stored} tokens are stored of {self.num_tokens}")
        if self.tile_rows > self.height or self.tile_columns > self.width:
            raise BadCode("there are more tiles than pixels")
        smallest = min(self.height // self.tile_rows, self.width // self.tile_columns)
        if not 0 <= self.overlap <= smallest // 2:
            raise BadCode(f"tiles of {smallest} pixels overlap by {self.overlap}, over a half")
        if len(self.metadata) >= 1 << 16:
            raise BadCode(f"metadata have {len(self.metadata):,} bytes, over 65,535")

    @property
    def tiles(self) -> int:
        """How many tiles there are."""
        return self.tile_rows * self.tile_columns

    def to_bytes(self) -> bytes:
        """Return the bytes of the file."""
        header = _HEADER.pack(
            MAGIC,
            VERSION,
            bytes.fromhex(self.model),
            self.height - 1,
            self.width - 1,
            self.grid_rows - 1,
            self.grid_columns - 1,
            self.num_tokens - 1,
            self.bits - 1,
            self.stored - 1,
            self.tile_rows - 1,
            self.tile_columns - 1,
            self.overlap,
            len(self.metadata),
        )
        body = header + pack(self.codes).tobytes() + self.metadata
        return body + _CHECKSUM.pack(zlib.crc32(body))

    @classmethod
    def from_bytes(cls, data: bytes) -> CodeFile:
        """Read the bytes of a file.

        Raises:
          BadCode: they are not those of a whole and unaltered file.
        """
        if data[: len(MAGIC)] != MAGIC:
            raise BadCode(f"it is no {SUFFIX} file")
        if len(data) < _HEADER.size + _CHECKSUM.size:
            raise BadCode("it is cut short")
        if data[len(MAGIC)] != VERSION:
            raise BadCode(
                f"it is of version {data[len(MAGIC)]} of the format, this program reads {VERSION}"
            )
        values = _HEADER.unpack_from(data)[2:]
        model, overlap, metadata_bytes = values[0].hex(), values[-2], values[-1]
        numbers = dict(zip(LIMITS, (value + 1 for value in values[1:-2]), strict=True))
        tiles = numbers["tile_rows"] * numbers["tile_columns"]
        each = packed_bytes(numbers["stored"], numbers["bits"])
        end = _HEADER.size + tiles * each
        expected = end + metadata_bytes + _CHECKSUM.size
        if len(data) < expected:
            raise BadCode(f"it is cut short: {len(data):,} bytes, expected {expected:,}")
        if len(data) > expected:
            raise BadCode(f"it has {len(data):,} bytes, expected {expected:,}")
        (checksum,) = _CHECKSUM.unpack_from(data, expected - _CHECKSUM.size)
        if checksum != zlib.crc32(data[: -_CHECKSUM.size]):
            raise BadCode("its checksum is wrong: the file was altered or damaged")
        packed = np.frombuffer(data, np.uint8, tiles * each, _HEADER.size).reshape(tiles, each)
        codes = unpack(packed, numbers["stored"], numbers["bits"])
        if not np.array_equal(pack(codes), packed):
            raise BadCode("there are bits after the last token")
        metadata = data[end : end + metadata_bytes]
        return cls(model=model, codes=codes, overlap=overlap, metadata=metadata, **numbers)


def packed_bytes(tokens: int, bits: int) -> int:
    """Return the bytes of a tile's code."""
    return -(-tokens * bits // 8)


def pack(codes: np.ndarray) -> np.ndarray:
    """Pack codes [B, N, K] of 0 and 1 to uint8 [B, bytes], the first bit on top."""
    return np.packbits(codes.reshape(len(codes), -1).astype(np.uint8), axis=-1)


def unpack(packed: np.ndarray, tokens: int, bits: int) -> np.ndarray:
    """Undo `pack`: uint8 [B, bytes] -> uint8 [B, N, K]."""
    flat = np.unpackbits(packed, axis=-1, count=tokens * bits)
    return flat.reshape(len(packed), tokens, bits)
