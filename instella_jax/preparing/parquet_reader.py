"""Parquet files as Hugging Face data sets have them: a column of pictures, columns of captions."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from instella_jax.data.samples import BadSample
from instella_jax.errors import UserError
from instella_jax.preparing.items import IMAGE_KEYS, Item, Problem, captions, label_caption

_DAMAGED = "damaged parquet file"


def read_parquet(path: str, keys: Sequence[str], image_key: str = "") -> Iterator[Item | Problem]:
    """Yield the rows of a file.

    Without a caption column, a column of classes whose names the file knows makes captions.

    Args:
      path: of the file.
      keys: columns that captions are in.
      image_key: column of the pictures, bytes or a struct with "bytes"; "" for the usual names.

    Raises:
      UserError: the file is not there, or has no such column.
    """
    from pyarrow import ArrowException, parquet

    row = 0
    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            column = _image_column(path, names, image_key)
            classes = _classes(file.schema_arrow.metadata or {})
            texts = [name for name in names if name in keys]
            # Every other plain column may hold what a filter asks for.
            plain = [
                f.name for f in file.schema_arrow if not f.type.num_fields and f.name != column
            ]
            wanted = list(dict.fromkeys([column, *texts, *plain]))
            for batch in file.iter_batches(batch_size=32, columns=wanted):
                for values in batch.to_pylist():
                    name = f"{path} row {row}"
                    row += 1
                    try:
                        found = captions(values, keys) or _class_captions(values, classes)
                    except BadSample as reason:
                        yield Problem(name, str(reason))
                        continue
                    image = values.pop(column)
                    if isinstance(image, dict):
                        image = image.get("bytes")
                    yield Item(name, image or None, found, values)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist any more; give the input as it was") from None
    except (ArrowException, OSError, UnicodeDecodeError):
        yield Problem(f"{path} from row {row}", _DAMAGED, of_file=True)


def _image_column(path: str, names: list[str], image_key: str) -> str:
    wanted = (image_key,) if image_key else IMAGE_KEYS
    for name in wanted:
        if name in names:
            return name
    raise UserError(
        f"{path} has no column {' or '.join(wanted)}, only {', '.join(names)}; name the one with "
        "the pictures by --image-key (addresses of pictures are not fetched)"
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
