"""From the `data` section of a config to the loader of a split."""

import logging
import math
from pathlib import Path
from typing import Any

import numpy as np

from instella_jax.config import Config
from instella_jax.data import buckets
from instella_jax.data.loader import Buckets, Mixture, make_loader
from instella_jax.data.scene_codes import CodedScenes
from instella_jax.data.scenes.source import EmojiScenes
from instella_jax.errors import UserError

logger = logging.getLogger(__name__)

KINDS = ("scenes", "folder", "shards", "codes")


def make_split(
    config: Config,
    split: str,
    *,
    captions: bool,
    text_tokenizer: Any = None,
    scene_codes: Path | None = None,
    **options: Any,
) -> Any:
    """Return the loader of a split of the configured data.

    Args:
      config: the `data` section: a kind of `KINDS`, and what each of them takes.
      split: "train", shuffled, endless and in buckets where the config has any, or "heldout", in
        order and once, at `image_size`.
      captions: whether the stage reads captions.
      text_tokenizer: adds "ids" and "mask" to the batches.
      scene_codes: folder of the codes of training scenes; see `data.scene_codes`.
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
    if not train:
        shared["advice"] = (
            f"that is all that is held out: check it, or hold out other data (data.{config.kind}."
            "heldout)"
        )
    buckets.check_config(config, tokenizer=not captions)
    if config.kind == "scenes":
        source = scenes_source(config, split)
        if train and scene_codes is not None:
            return make_loader(CodedScenes(source, scene_codes), threads=0, **shared, **options)
        # Scenes are computed, not read: more threads only get in each other's way.
        return make_loader(source, threads=0, transform=_drop_facts, **shared, **options)
    if config.kind in buckets.KINDS:
        parts, section = _pictures(config, split, captions), config[config.kind]
        if train and captions and section.flip and options.get("process_index", 0) == 0:
            logger.warning(
                "data.%s.flip is %g: mirrored pictures keep their captions, and those that say "
                "left or right become wrong; 0 mirrors none",
                config.kind,
                section.flip,
            )
        if train and config.buckets:
            batch = options["batch_size"] * options.get("process_count", 1)
            source = _in_buckets(config, parts, batch, options.get("process_index", 0) == 0)
            return make_loader(source, **shared, **options)
        source = _mix(parts, section.get("weights", ""))
        side = config.image_size
        transform = _crop(section, (side, side), train)
        return make_loader(source, transform=transform, **shared, **options)
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


def _pictures(config: Config, split: str, captions: bool) -> list[Any]:
    """Return the data sets of pictures that are mixed.

    Raises:
      UserError: a value of the section is out of range, or a data set cannot be used.
    """
    from instella_jax.data.folder import FolderSource
    from instella_jax.data.shards import ImageShards

    section = config[config.kind]
    options: dict[str, Any] = dict(
        split=split,
        heldout=section.heldout,
        captions=captions,
        decode_side=math.ceil(config.image_size / section.min_keep),
    )
    if config.kind == "folder":
        return [FolderSource(path, **options) for path in part_paths(config)]
    return [ImageShards(path, **options) for path in part_paths(config)]


def _in_buckets(config: Config, parts: list[Any], batch: int, tell: bool) -> Buckets:
    """Sort pictures into the buckets of the config.

    Args:
      config: the `data` section.
      parts: the data sets.
      batch: pictures that a bucket needs.
      tell: whether to print how many each bucket has.

    Raises:
      UserError: no picture can be read.
    """
    section, shapes = config[config.kind], buckets.parse_shapes(config.buckets)
    sizes = [part.sizes() for part in parts]
    chosen = buckets.sort(np.concatenate(sizes), shapes, batch)
    by_part = np.split(chosen, np.cumsum([len(s) for s in sizes])[:-1])
    totals = [max(1, int(np.count_nonzero(numbers >= 0))) for numbers in by_part]
    weights = _weights(parts, section.get("weights", "")) or [float(total) for total in totals]
    found: list[tuple[Any, float, Any]] = []
    for bucket, (height, width) in enumerate(shapes):
        decode_side = math.ceil(max(height, width) / section.min_keep)
        sources, shares, numbers = [], [], []
        for number, part in enumerate(parts):
            (members,) = np.nonzero(by_part[number] == bucket)
            if len(members):
                members = members.astype(np.min_scalar_type(len(part)))
                sources.append(buckets.Subset(part.decoded_at(decode_side), members))
                # A picture is as likely as it would be without buckets.
                shares.append(weights[number] * len(members) / totals[number])
                numbers.append(number)
        if tell:
            print(f"bucket {height}x{width}: {sum(map(len, sources)):,} pictures", flush=True)
        if sources:
            mixture = Mixture(tuple(sources), tuple(shares), tuple(numbers))
            source = mixture if len(parts) > 1 else sources[0]
            found.append((source, sum(shares), _crop(section, (height, width), True)))
    if not found:
        raise UserError("no picture has a size that can be read; check the data")
    return Buckets(*(tuple(column) for column in zip(*found, strict=True)))


def part_paths(config: Config) -> list[str]:
    """Return the folders that the `data` section mixes, [] where its kind mixes none.

    Raises:
      UserError: none is given.
    """
    if config.kind == "scenes":
        return []
    given = config[config.kind].path
    if config.kind == "folder" and given and Path(given).expanduser().is_dir():
        return [given]  # a folder of pictures may have commas in its name
    paths = [path.strip() for path in given.split(",") if path.strip()]
    if not paths:
        raise UserError(
            f"data.{config.kind}.path is empty: give --config.data.{config.kind}.path=FOLDER, or "
            "several with commas between them"
        )
    return paths


def part_names(config: Config) -> list[str]:
    """Return a name for each part of a mixture, [] where nothing is mixed."""
    paths = part_paths(config)
    if len(paths) < 2:
        return []
    names = [Path(path).name for path in paths]
    return [
        f"{name}_{number}" if names.count(name) > 1 else name for number, name in enumerate(names)
    ]


def _weights(parts: list[Any], weights: str) -> list[float]:
    """Read "3:1", [] where nothing is given."""
    try:
        values = [float(weight) for weight in weights.split(":")] if weights else []
    except ValueError:
        values = [-1.0]
    if weights and (len(values) != len(parts) or not all(0 < v < math.inf for v in values)):
        raise UserError(
            f"weights are {weights!r} for {len(parts)} data set(s): expected a number over 0 for "
            "each, with colons between them, for example 3:1"
        )
    return values


def _mix(parts: list[Any], weights: str) -> Any:
    """Join parts by weights "3:1", by their sizes where none are given."""
    values = _weights(parts, weights)
    if len(parts) == 1:
        return parts[0]
    return Mixture(tuple(parts), tuple(values or [float(len(part)) for part in parts]))


def _crop(config: Config, shape: tuple[int, int], train: bool) -> Any:
    from instella_jax.data.transforms import EvalTransform, TrainTransform

    if train:
        return TrainTransform(*shape, min_keep=config.min_keep, flip=config.flip)
    return EvalTransform(*shape)


def scenes_source(config: Config, split: str) -> EmojiScenes:
    """Return the scenes of a split that the `data` section describes."""
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
    """Leave out what only evaluation reads."""
    return {"image": sample["image"], "text": sample["text"]}
