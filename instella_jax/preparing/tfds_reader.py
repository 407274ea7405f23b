"""Data sets prepared by TensorFlow Datasets in ArrayRecord files, read without TensorFlow."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Sequence
from typing import Any

from instella_jax.data.captions import captions, label_caption, named
from instella_jax.data.samples import BadSample
from instella_jax.errors import UserError
from instella_jax.preparing.items import IMAGE_KEYS, Item, Problem
from instella_jax.runtime.absl_flags import allow_unparsed_flags


def _builder(path: str | os.PathLike[str], split: str) -> Any:
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder_from_directory(os.fspath(path))
    except Exception as error:  # whatever a damaged description makes it raise
        line = " ".join(str(error).split())[:200]
        raise UserError(
            f"{path} is not a TFDS data set ({line}); give the folder of one version, with "
            "dataset_info.json"
        ) from None
    if split not in builder.info.splits:
        known = ", ".join(builder.info.splits)
        raise UserError(f"{path} has no split {split!r}, only {known}; choose one by --split")
    form = builder.info.file_format
    if form is None or form.value != "array_record":
        raise UserError(
            f"{path} is in {form.value if form else 'unknown'} files; prepare it with "
            "file_format='array_record', which needs no TensorFlow to be read"
        )
    return builder


def count_examples(path: str | os.PathLike[str], split: str) -> int:
    """Return how many examples a split has.

    Raises:
      UserError: the folder is not such a data set, or has no such split.
    """
    return _builder(path, split).info.splits[split].num_examples


def read_tfds(
    path: str, split: str, start: int, stop: int, keys: Sequence[str], image_key: str = ""
) -> Iterator[Item | Problem]:
    """Yield the examples `start` to `stop` of a split.

    Without a caption feature, classes make captions.

    Args:
      path: folder of one version of a data set.
      split: of the data set.
      start: first example.
      stop: one more than the last.
      keys: features that captions are in.
      image_key: feature of the picture; "" for the usual names.

    Raises:
      UserError: the folder is not such a data set, or has no picture.
    """
    import tensorflow_datasets as tfds

    allow_unparsed_flags()
    builder = _builder(path, split)
    features = builder.info.features
    wanted = (image_key,) if image_key else IMAGE_KEYS
    columns = named(features, wanted)
    if not columns:
        raise UserError(
            f"{path} has no feature {' or '.join(wanted)}, only {', '.join(features)}; name the "
            "one with the pictures by --image-key"
        )
    # The file as it was prepared, if it is one: nothing is lost by compressing again.
    encoded = [name for name in columns if isinstance(features[name], tfds.features.Image)]
    skip = {name: tfds.decode.SkipDecoding() for name in encoded}
    source = builder.as_data_source(split=split, decoders=skip or None)
    labels = [n for n, f in features.items() if isinstance(f, tfds.features.ClassLabel)]
    for index in range(start, stop):
        name = f"{split} {index}"
        try:
            example = source[index]
        except Exception:  # damaged records make its decoders raise all kinds
            yield Problem(name, "damaged record")
            continue
        try:
            texts = captions(example, keys) or tuple(
                label_caption(features[n].int2str(int(example[n])))
                for n in labels
                if 0 <= int(example[n]) < features[n].num_classes  # -1: not known
            )
        except BadSample as reason:
            yield Problem(name, str(reason))
            continue
        images = [_file(example.pop(column)) for column in columns]
        image = next((image for image in images if image), None)
        yield Item(name, image, texts, example, tuple(features))


def _file(image: Any) -> bytes | None:
    """Return a picture's file: as it is, or made without loss of uint8 [h, w] or [h, w, 1 or 3];
    None if it is something else."""
    from PIL import Image

    if isinstance(image, bytes):
        return image
    if str(getattr(image, "dtype", None)) != "uint8" or image.ndim not in (2, 3):
        return None
    if image.ndim == 3 and image.shape[2] not in (1, 3):
        return None
    file = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[2:] == (1,) else image).save(file, "png")
    return file.getvalue()
