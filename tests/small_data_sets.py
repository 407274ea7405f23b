"""Data sets of a few pictures, written by the real libraries, and what an import made of them."""

import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from instella_jax.data.shards import ImageShards


def picture(value, height=24, width=32, kind="png", **options):
    """A file of a picture whose mean colour tells `value`."""
    noise = np.random.default_rng(value).integers(-3, 4, (height, width, 3))
    file = io.BytesIO()
    image = Image.fromarray(np.clip(value + noise, 0, 255).astype(np.uint8))
    image.save(file, kind, **options)
    return file.getvalue()


def write_tar(path, members, mode="w"):
    with tarfile.open(path, mode) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def contents(folder):
    """{key: (captions, mean colour)} of everything in a data set; keys must differ."""
    source = ImageShards(folder, captions=False)
    found = {}
    for index in range(len(source)):
        header, _ = source.read(index)
        assert header["key"] not in found
        found[header["key"]] = (header["texts"], float(source[index]["image"].mean()))
    return found


def samples(numbers, **options):
    members = []
    for number in numbers:
        members.append((f"{number:06d}.png", picture(number, **options)))
        members.append((f"{number:06d}.txt", f"picture {number}".encode()))
    return members


def make_tfds(folder, features, examples):
    """Prepares a real TFDS data set, without TensorFlow; returns its folder."""
    import tensorflow_datasets as tfds

    class Tiny(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        __module__ = "tiny"  # no module of a package, whose resources it would look for
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, manager):
            return {"train": enumerate(examples)}

        def _generate_examples(self):
            raise NotImplementedError

    builder = Tiny(data_dir=str(folder), file_format="array_record")
    builder.download_and_prepare()
    return Path(builder.data_dir)
