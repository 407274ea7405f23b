"""The training format: ArrayRecord shards of captioned pictures or of codes.

A data set is a folder with `dataset.json`, which lists the shards and how many records each has,
and the shards. A record is the length of its header (uint32, little-endian), the header (JSON:
"key", "texts" and "size", width and height) and the payload: a picture file's bytes, or packed
codes.
ArrayRecord hashes every record, so damage is noticed where it is and costs that record alone.
Beside a shard of pictures are their sizes, see `picture_sizes`.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import io
import json
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from instella_jax.data.folder import SPLITS
from instella_jax.data.image_sizes import read_sizes, write_sizes
from instella_jax.data.images import decode_picture
from instella_jax.data.samples import BadSample
from instella_jax.errors import UserError
from instella_jax.runtime.absl_flags import allow_unparsed_flags
from instella_jax.runtime.files import put_in_place, write_json

DATASET_FILE = "dataset.json"
_FORMAT = {"format": "instella-jax-shards", "version": 1}


@dataclasses.dataclass(frozen=True)
class Shard:
    """A file of a data set: its name in the folder, its records and its size in bytes."""

    file: str
    records: int
    bytes: int


def pack(header: Mapping[str, Any], payload: bytes) -> bytes:
    """Make a record."""
    text = json.dumps(dict(header), ensure_ascii=False).encode()
    return struct.pack("<I", len(text)) + text + payload


def unpack(record: bytes) -> tuple[dict[str, Any], bytes]:
    """Take a record apart into header and payload.

    Raises:
      ValueError: it is not a record.
    """
    if len(record) < 4:
        raise ValueError("it is too short")
    (length,) = struct.unpack_from("<I", record)
    header = json.loads(record[4 : 4 + length])
    if not isinstance(header, dict) or len(record) < 4 + length:
        raise ValueError("its header is cut off")
    return header, record[4 + length :]


@contextlib.contextmanager
def shard_writer(path: Path, scratch: Path) -> Iterator[_ShardWriter]:
    """Write a shard under another name, and put it in place when it is whole and on disk.

    Raises:
      UserError: it cannot be written.
    """
    writer = _ShardWriter(scratch, path)
    try:
        yield writer
        writer.finish()
    finally:
        writer.discard()
        scratch.unlink(missing_ok=True)


class _ShardWriter:
    """Appends records to a file that gets its name in the end."""

    def __init__(self, scratch: Path, path: Path):
        from array_record.python.array_record_module import ArrayRecordWriter

        self.records = 0
        self._sizes: list[Sequence[int] | None] = []
        self._scratch, self._path = scratch, path
        with self._raise_user_error():
            # One record a group: random access reads it alone. Pictures do not compress.
            self._writer: Any = ArrayRecordWriter(str(scratch), "group_size:1,uncompressed")

    def write(self, header: Mapping[str, Any], payload: bytes) -> None:
        record = pack(header, payload)
        with self._raise_user_error():
            self._writer.write(record)
        self._sizes.append(header.get("size"))
        self.records += 1

    def finish(self) -> None:
        """Close the file, read its index back, wait for the disk and give it its name."""
        from array_record.python.array_record_module import ArrayRecordReader

        with self._raise_user_error():
            self._writer.close()
            if not self.records:
                return
            reader = ArrayRecordReader(str(self._scratch))
            found = reader.num_records()
            reader.close()
            if found != self.records:
                raise OSError(f"{found} of {self.records} records arrived on disk")
            write_sizes(self._path, self._sizes)
            put_in_place(self._scratch, self._path)

    @contextlib.contextmanager
    def _raise_user_error(self) -> Iterator[None]:
        try:
            yield
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"{self._path} cannot be written ({' '.join(str(error).split())[:200]}); make room "
                "and run the same command again: what is done stays"
            ) from error

    def discard(self) -> None:
        """Close the file if it is still open, whatever is in it."""
        with contextlib.suppress(Exception):
            if self._writer.is_open():
                self._writer.close()


def write_dataset_file(
    folder: Path, content: str, shards: Sequence[Shard], details: Mapping[str, Any]
) -> None:
    """Write `dataset.json`, which makes a folder of shards a data set.

    Args:
      folder: of the shards.
      content: "images" or "codes".
      shards: in the order in which their records are numbered.
      details: further entries.
    """
    records = sum(shard.records for shard in shards)
    rows = [dataclasses.asdict(shard) for shard in shards]
    write_json(
        folder / DATASET_FILE,
        {**_FORMAT, "content": content, "records": records, **details, "shards": rows},
    )


def read_dataset_file(folder: str | os.PathLike[str], content: str) -> dict[str, Any]:
    """Read `dataset.json`.

    Raises:
      UserError: the folder is no data set, or one of something other than `content`.
    """
    path = Path(folder).expanduser() / DATASET_FILE
    how = "data import" if content == "images" else "data encode"
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
        good = all(description[key] == value for key, value in _FORMAT.items())
        shards = [Shard(**row) for row in description["shards"]]
        found = description["content"]
    except OSError as error:
        raise UserError(
            f"{folder} is not a finished data set: cannot read {path.name} ({error.strerror}); "
            f"make one with `instella-jax {how}`"
        ) from None
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} is damaged ({error}); run `instella-jax {how}` again") from None
    if not good:
        raise UserError(
            f"{path} is of format {description['format']!r}, version {description['version']}; "
            f"expected {_FORMAT['format']!r}, version {_FORMAT['version']}: use the program that "
            "made it"
        )
    if found != content:
        raise UserError(
            f"{folder} holds {found}, expected {content}; make them with `instella-jax {how}`"
        )
    return {**description, "shards": shards}


@dataclasses.dataclass(frozen=True)
class _Piece:
    """What ArrayRecordDataSource needs to know so that it opens no file before it is read."""

    filename: str
    skip: int
    take: int
    examples_in_shard: int


def _unusable(folder: Path, shards: Sequence[Shard]) -> list[tuple[range, str]]:
    """Find the shards that are not of their size, such as those that were copied in part.

    Returns:
      The numbers of the records of each, and what is wrong with it.

    Raises:
      UserError: a shard is missing.
    """
    start, found = 0, []
    for shard in shards:
        try:
            size = (folder / shard.file).stat().st_size
        except OSError:
            raise UserError(
                f"{folder} lacks {shard.file}, which its {DATASET_FILE} lists; copy the whole "
                "data set"
            ) from None
        numbers = range(start, start + shard.records)
        start = numbers.stop
        if size != shard.bytes:
            reason = (
                f"{shard.file} of {folder} has {size:,} bytes instead of {shard.bytes:,}: its "
                f"{shard.records:,} records are not used; copy it again"
            )
            found.append((numbers, reason))
    return found


class Records:
    """Random access to the records of a data set, or of a split of it.

    One record in every round(1 / heldout) is held out, by its number alone: codes are split as the
    pictures that they were made from. Files are opened when they are first read; all records of one
    that is not of the size it was written with count as damaged, for one reason.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        content: str,
        *,
        split: str = "all",
        heldout: float = 0.02,
    ):
        """Open a data set.

        Args:
          folder: of the data set.
          content: "images" or "codes".
          split: "train", "heldout" or "all".
          heldout: part of the records held out, in (0, 0.5]; one at least.

        Raises:
          UserError: the folder is no such data set, a shard is missing, the split is empty.
        """
        from array_record.python.array_record_data_source import ArrayRecordDataSource

        if split not in SPLITS:
            raise UserError(f"unknown split {split!r}; expected one of {', '.join(SPLITS)}")
        if not 0 < heldout <= 0.5:
            raise UserError(f"heldout is {heldout}: expected a part in (0, 0.5]")
        self.folder = Path(folder).expanduser()
        self.description = read_dataset_file(self.folder, content)
        shards: list[Shard] = self.description["shards"]
        self._unusable = _unusable(self.folder, shards)
        self._split, self._period = split, round(1 / heldout)
        self._total = sum(shard.records for shard in shards)
        if len(self) == 0:
            raise UserError(f"{self.folder} has {self._total} record(s), none for {split}")
        allow_unparsed_flags()
        pieces: Any = [_Piece(str(self.folder / s.file), 0, s.records, s.records) for s in shards]
        self._records = ArrayRecordDataSource(pieces)

    def __len__(self) -> int:
        """Return the number of records, broken ones included."""
        heldout = -(-self._total // self._period)
        return {"all": self._total, "heldout": heldout, "train": self._total - heldout}[self._split]

    def __repr__(self) -> str:
        """Name folder and split; grain stores this to recognise the source."""
        return f"{type(self).__name__}({str(self.folder)!r}, {self._split}, {len(self)} records)"

    def number(self, index: int) -> int:
        """Return the number in the whole data set of a record of the split."""
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        if self._split == "heldout":
            return index * self._period
        return index if self._split == "all" else index + index // (self._period - 1) + 1

    def _numbers(self) -> np.ndarray | slice:
        """Return what selects the split's records from those of the whole data set."""
        if self._split == "all":
            return slice(None)
        if self._split == "heldout":
            return slice(None, None, self._period)
        return np.arange(self._total) % self._period != 0

    def read(self, index: int) -> tuple[dict[str, Any], bytes]:
        """Read the header and the payload of a record.

        Raises:
          BadSample: it is damaged.
        """
        return self._read(self.number(index))

    def _read(self, number: int) -> tuple[dict[str, Any], bytes]:
        """Read a record by its number in the whole data set; see `read`."""
        for numbers, reason in self._unusable:
            if number in numbers:
                raise BadSample(reason)
        try:
            return unpack(self._records[number])
        except (RuntimeError, ValueError, IndexError) as error:
            reason = " ".join(str(error).split())[:120]
            raise BadSample(f"record {number} of {self.folder} is damaged: {reason}") from None


class ImageShards(Records):
    """Captioned pictures of a data set as a source.

    `source[i]` is {"image": uint8 [h, w, 3], "texts": tuple of str}; see `data.transforms`.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        split: str = "all",
        heldout: float = 0.02,
        captions: bool = True,
        decode_side: int | None = None,
    ):
        """Open a data set of pictures; see `Records` and `data.folder.FolderSource`."""
        super().__init__(folder, "images", split=split, heldout=heldout)
        self._captions, self._decode_side = captions, decode_side

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Decode one picture.

        Raises:
          BadSample: it cannot be read, or has no caption where captions are wanted.
        """
        header, payload = self.read(index)
        name = f"{header.get('key')} of {self.folder}"
        texts = tuple(header.get("texts") or ()) if self._captions else ("",)
        if not texts:
            raise BadSample(f"{name} has no caption")
        return {"image": self.picture(payload, name), "texts": texts}

    def decoded_at(self, decode_side: int | None) -> ImageShards:
        """Return the same source with another `decode_side`."""
        other = copy.copy(self)
        other._decode_side = decode_side
        return other

    def sizes(self) -> np.ndarray:
        """Return width and height of each picture of the split, int32 [n, 2]; 0 where it is
        damaged."""
        start, found = 0, []
        for shard in self.description["shards"]:
            numbers = range(start, start + shard.records)
            path = self.folder / shard.file
            found.append(read_sizes(path, numbers, lambda number: self._read(number)[0]))
            start += shard.records
        return np.concatenate(found)[self._numbers()]

    def picture(self, payload: bytes, name: str) -> np.ndarray:
        """Decode a picture file: uint8 [h, w, 3]."""
        return decode_picture(io.BytesIO(payload), name, decode_side=self._decode_side)
