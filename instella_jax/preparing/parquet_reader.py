"""Parquet files as Hugging Face data sets have them: columns of pictures, columns of captions.

A file is read row group by row group, and a row group in small pieces: a damaged page costs the
rows of its row group from there on, whose number is known, and memory does not grow with a file.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from instella_jax.data.captions import captions, label_caption, named
from instella_jax.data.samples import BadSample
from instella_jax.errors import UserError
from instella_jax.preparing.items import IMAGE_KEYS, MAX_BYTES, Item, Problem

if TYPE_CHECKING:
    import pyarrow as pa

_DAMAGED, _DAMAGED_ROWS = "damaged parquet file", "damaged row group"
# Rows are taken out of a file so many at a time, or as many as come to about so many bytes.
_ROWS, _BYTES = 32, 2**24
# How much of each column is read from the disk at a time.
_BUFFER = 2**20


def count_rows(path: str) -> int | None:
    """Return how many rows a file has; None where it is damaged.

    Raises:
      UserError: it is not there.
    """
    from pyarrow import ArrowException, parquet

    try:
        return parquet.read_metadata(path).num_rows
    except FileNotFoundError:
        raise _gone(path) from None
    except (ArrowException, OSError):
        return None


def read_parquet(
    path: str, keys: Sequence[str], image_key: str = "", root: str = ""
) -> Iterator[Item | Problem]:
    """Yield the rows of a file.

    Without a caption column, a column of classes whose names the file knows makes captions.

    Args:
      path: of the file.
      keys: columns that captions are in.
      image_key: column of the pictures: bytes, a struct of "bytes" and "path", or paths; "" for the
        usual names, of which a row may use any.
      root: folder of the data set, in which files that rows name by their paths must be; "" for the
        folder of the file.

    Raises:
      UserError: the file is not there, or has no such column.
    """
    from pyarrow import ArrowException, parquet

    try:
        file = parquet.ParquetFile(
            path, buffer_size=_BUFFER, pre_buffer=False, page_checksum_verification=True
        )
    except FileNotFoundError:
        raise _gone(path) from None
    except (ArrowException, OSError):
        yield Problem(path, _DAMAGED, of_file=True)
        return
    with file:
        rows = _Rows(path, file.schema_arrow, keys, image_key, root or os.path.dirname(path))
        start = 0
        for number in range(file.num_row_groups):
            stop = start + file.metadata.row_group(number).num_rows
            for values in _read_group(file, number, rows.columns):
                yield rows.item(start, values)
                start += 1
            if start < stop:
                name = f"{path} rows {start} to {stop - 1}"
                yield Problem(name, _DAMAGED_ROWS, count=stop - start)
            start = stop


def _gone(path: str) -> UserError:
    return UserError(f"{path} does not exist any more; give the input as it was")


def _read_group(file: Any, number: int, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yield the rows of a row group up to the first damaged page."""
    from pyarrow import ArrowException

    done = 0
    # What is damaged fails for all rows that are taken out together: then one after the other.
    for most in (_ROWS, 1):
        try:
            for values in itertools.islice(_batches(file, number, columns, most), done, None):
                yield values
                done += 1
            return
        except (ArrowException, OSError):
            continue


def _batches(file: Any, number: int, columns: Sequence[str], most: int) -> Iterator[dict[str, Any]]:
    """Yield the rows of a row group, strings as bytes, at most so many in memory at a time."""
    import pyarrow as pa

    group = file.metadata.row_group(number)
    parts = (group.column(n) for n in range(group.num_columns))
    size = sum(part.total_uncompressed_size for part in parts)
    rows = max(1, min(most, _BYTES * group.num_rows // max(size, 1)))
    for batch in file.iter_batches(batch_size=rows, row_groups=[number], columns=columns):
        # Strings in a file need not be UTF-8: pyarrow would refuse all rows for one of them.
        schema = pa.schema([(field.name, _raw(field.type)) for field in batch.schema])
        yield from batch.cast(schema).to_pylist()


def _raw(kind: pa.DataType) -> pa.DataType:
    """Return a type with bytes in place of strings and values in place of dictionaries."""
    import pyarrow as pa
    from pyarrow import types

    if types.is_dictionary(kind):
        return _raw(kind.value_type)
    if types.is_string(kind) or types.is_string_view(kind):
        return pa.binary()
    if types.is_large_string(kind):
        return pa.large_binary()
    if types.is_list(kind):
        return pa.list_(_raw(kind.value_type))
    if types.is_large_list(kind):
        return pa.large_list(_raw(kind.value_type))
    if types.is_struct(kind):
        return pa.struct([(field.name, _raw(field.type)) for field in kind])
    return kind


class _Rows:
    """Makes items of the rows of a file."""

    def __init__(
        self, path: str, schema: pa.Schema, keys: Sequence[str], image_key: str, root: str
    ):
        self._path, self._keys, self._root = path, keys, os.path.realpath(root)
        self._images = _image_columns(path, schema, image_key)
        self._classes = _classes(schema.metadata or {})
        self._texts = [name for name in named(schema.names, keys) if name not in self._images]
        self._names = tuple(schema.names)
        # Every other column of plain values may hold what a filter asks for.
        plain = [f.name for f in schema if not f.type.num_fields and not _holds_bytes(f.type)]
        self.columns = list(dict.fromkeys([*self._images, *self._texts, *plain]))

    def item(self, row: int, values: dict[str, Any]) -> Item | Problem:
        """Return a row as an item or a problem."""
        name = f"{self._path} row {row}"
        images = [values.pop(column) for column in self._images]
        meta = {
            column: value.decode("utf-8", "replace") if isinstance(value, bytes) else value
            for column, value in values.items()
        }
        try:
            texts = captions({column: values[column] for column in self._texts}, self._keys)
            texts = texts or _class_captions(values, self._classes)
            image = next((found for value in images if (found := self._picture(value))), None)
        except BadSample as reason:
            return Problem(name, str(reason))
        return Item(name, image, texts, meta, self._names)

    def _picture(self, value: Any) -> bytes | None:
        """Return the file of a picture, or None where a column holds none.

        Raises:
          BadSample: there is one that cannot be read.
        """
        if not isinstance(value, dict):
            return value or None
        if value.get("bytes"):
            return value["bytes"]
        path = os.fsdecode(value.get("path") or b"")
        if not path or "\0" in path:
            return None
        for folder in (os.path.dirname(self._path), self._root):
            # Nothing outside of the data set is read, wherever a path or a link leads.
            found = os.path.realpath(os.path.join(folder, path))
            if os.path.commonpath([found, self._root]) == self._root and os.path.isfile(found):
                return _read(found)
        return None


def _read(path: str) -> bytes:
    try:
        if os.path.getsize(path) > MAX_BYTES:
            raise BadSample("file too large")
        with open(path, "rb") as file:
            return file.read()
    except OSError:
        raise BadSample("file cannot be read") from None


def _holds_bytes(kind: pa.DataType) -> bool:
    from pyarrow import types

    tests = (types.is_binary, types.is_large_binary, types.is_fixed_size_binary)
    return any(test(kind) for test in (*tests, types.is_binary_view))


def _is_image(kind: pa.DataType) -> bool:
    """Return whether a column of a type may hold pictures or paths of pictures."""
    from pyarrow import types

    if types.is_struct(kind):
        return {"bytes", "path"} & {field.name for field in kind} != set()
    return _holds_bytes(kind)


def _image_columns(path: str, schema: pa.Schema, image_key: str) -> list[str]:
    """Return the columns that pictures are in."""
    wanted = (image_key,) if image_key else IMAGE_KEYS
    found = named(schema.names, wanted)
    if usable := [name for name in found if _is_image(schema.field(name).type)]:
        return usable
    if found:
        raise UserError(
            f"column {found[0]} of {path} is of type {schema.field(found[0]).type}, expected bytes "
            'or a struct of "bytes" and "path"; name the one with the pictures\' files by '
            "--image-key (addresses of pictures are not fetched)"
        )
    raise UserError(
        f"{path} has no column {' or '.join(wanted)}, only {', '.join(schema.names)}; name the one "
        "with the pictures' files by --image-key (addresses of pictures are not fetched)"
    )


def _classes(metadata: dict[bytes, bytes]) -> dict[str, list[str]]:
    """Return names of the classes by column, as the `datasets` library notes them."""
    try:
        features = json.loads(metadata[b"huggingface"])["info"]["features"]
        return {
            name: feature["names"]
            for name, feature in features.items()
            if isinstance(feature, dict) and feature.get("_type") == "ClassLabel"
        }
    except (KeyError, ValueError, TypeError, AttributeError):
        return {}


def _class_captions(values: dict[str, Any], classes: dict[str, list[str]]) -> tuple[str, ...]:
    found = []
    for column, names in classes.items():
        label = values.get(column)
        if isinstance(label, int) and 0 <= label < len(names):
            found.append(label_caption(names[label]))
    return tuple(found)
