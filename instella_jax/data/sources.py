"""From the `data` section of a config to the loader of a split."""

import math
from typing import Any

from instella_jax.config import Config
from instella_jax.data.emoji_scenes import EmojiScenes
from instella_jax.data.loader import make_loader
from instella_jax.errors import UserError


def make_split(
    config: Config, split: str, *, captions: bool, text_tokenizer: Any = None, **options: Any
) -> Any:
    """Returns the loader of a split of the configured data.

    Args:
      config: the `data` section: kind "scenes" or "folder", and what each of them takes.
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
        from instella_jax.data.transforms import EvalTransform, TrainTransform

        folder = config.folder
        source = FolderSource(
            folder.path, split=split, heldout=folder.heldout, captions=captions,
            decode_side=math.ceil(size / folder.min_keep),
        )  # fmt: skip
        transform = (
            TrainTransform(size, size, min_keep=folder.min_keep, flip=folder.flip)
            if train
            else EvalTransform(size, size)
        )
        return make_loader(source, transform=transform, **shared, **options)
    raise UserError(f"data.kind is {config.kind!r}: expected 'scenes' or 'folder'")


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
