"""From the `data` section of a config to the loader of a split."""

import math
from pathlib import Path
from typing import Any

from instella_jax.config import Config
from instella_jax.data.emoji_scenes import EmojiScenes
from instella_jax.data.loader import Mixture, make_loader
from instella_jax.errors import UserError

KINDS = ("scenes", "folder", "shards", "codes")


def make_split(
    config: Config, split: str, *, captions: bool, text_tokenizer: Any = None, **options: Any
) -> Any:
    """Returns the loader of a split of the configured data.

    Args:
      config: the `data` section: a kind of `KINDS`, and what each of them takes.
      split: "train", shuffled and endless, or "heldout", in order and once.
      captions: whether the stage reads captions.
      text_tokenizer: adds "ids" and "mask" to the batches.
      **options: further arguments of `make_loader`, batch_size among them.

    Raises:
      UserError: the kind is unknown, or the source says that it cannot be used.
    """
    train = split == "train"
    shared = dict(
        seed=config.seed,
        shuffle=train,
        repeat=train,
        text_tokenizer=text_tokenizer,
        workers=config.workers if train else 0,
    )
    size = config.image_size
    if config.kind == "scenes":
        source = scenes_source(config, split)
        # Scenes are computed, not read: more threads only get in each other's way.
        return make_loader(source, threads=0, transform=_drop_facts, **shared, **options)
    if config.kind == "folder":
        from instella_jax.data.folder import FolderSource

        folder = config.folder
        source = FolderSource(
            folder.path, split=split, heldout=folder.heldout, captions=captions,
            decode_side=math.ceil(size / folder.min_keep),
        )  # fmt: skip
        return make_loader(source, transform=_crop(folder, size, train), **shared, **options)
    if config.kind == "shards":
        from instella_jax.data.shards import ImageShards

        shards = config.shards
        parts = [
            ImageShards(
                path, split=split, heldout=shards.heldout, captions=captions,
                decode_side=math.ceil(size / shards.min_keep),
            )
            for path in part_paths(config)
        ]  # fmt: skip
        source = _mix(parts, shards.weights)
        return make_loader(source, transform=_crop(shards, size, train), **shared, **options)
    if config.kind == "codes":
        from instella_jax.data.codes import CodeShards, PickVariant

        if not captions:
            raise UserError(
                "data.kind is 'codes', but a tokenizer trains on pictures: use 'shards'"
            )
        parts = [
            CodeShards(path, split=split, heldout=config.codes.heldout)
            for path in part_paths(config)
        ]
        source = _mix(parts, config.codes.weights)
        return make_loader(source, transform=PickVariant(train), **shared, **options)
    raise UserError(f"data.kind is {config.kind!r}: expected one of {', '.join(KINDS)}")


def part_paths(config: Config) -> list[str]:
    """Returns the folders that the `data` section mixes, [] where its kind mixes none.

    Raises:
      UserError: none is given.
    """
    if config.kind not in ("shards", "codes"):
        return []
    paths = [path.strip() for path in config[config.kind].path.split(",") if path.strip()]
    if not paths:
        raise UserError(
            f"data.{config.kind}.path is empty: give --config.data.{config.kind}.path=FOLDER, or "
            "several with commas between them"
        )
    return paths


def part_names(config: Config) -> list[str]:
    """Returns a name for each part of a mixture, [] where nothing is mixed."""
    paths = part_paths(config)
    if len(paths) < 2:
        return []
    names = [Path(path).name for path in paths]
    return [
        f"{name}_{number}" if names.count(name) > 1 else name for number, name in enumerate(names)
    ]


def _mix(parts: list[Any], weights: str) -> Any:
    """Joins parts by weights "3:1", by their sizes where none are given."""
    try:
        values = [float(weight) for weight in weights.split(":")] if weights else []
    except ValueError:
        values = [-1.0]
    if weights and (len(values) != len(parts) or not all(0 < v < math.inf for v in values)):
        raise UserError(
            f"weights are {weights!r} for {len(parts)} data set(s): expected a number over 0 for "
            "each, with colons between them, for example 3:1"
        )
    if len(parts) == 1:
        return parts[0]
    return Mixture(tuple(parts), tuple(values or [float(len(part)) for part in parts]))


def _crop(config: Config, size: int, train: bool) -> Any:
    from instella_jax.data.transforms import EvalTransform, TrainTransform

    if train:
        return TrainTransform(size, size, min_keep=config.min_keep, flip=config.flip)
    return EvalTransform(size, size)


def scenes_source(config: Config, split: str) -> EmojiScenes:
    """Returns the scenes of a split that the `data` section describes."""
    scenes = config.scenes
    return EmojiScenes(
        config.image_size,
        config.seed,
        split,
        scenes.concepts if isinstance(scenes.concepts, str) else tuple(scenes.concepts),
        tuple(scenes.styles),
        scenes.places,
        scenes.max_objects,
    )


def _drop_facts(sample: dict[str, Any], _: Any) -> dict[str, Any]:
    """Leaves out what only evaluation reads."""
    return {"image": sample["image"], "text": sample["text"]}
