"""Whether a generator trains on precomputed codes, or encodes images in each step."""

import json
from pathlib import Path

from instella_jax.config import Config
from instella_jax.data import scene_codes
from instella_jax.data.codes import fingerprint
from instella_jax.weights import model_folder


def describe_scenes(config: Config) -> dict[str, str]:
    """Return what the codes of training scenes depend on: scenes, tokenizer and the code's sizes.

    Args:
      config: of a generator.

    Raises:
      UserError: the tokenizer has no weights.
    """
    data, model = config.data, config.model
    scenes = {name: value for name, value in data.scenes.items() if name != "codes"}
    scenes |= {"seed": data.seed, "image_size": data.image_size}
    return {
        "scenes": json.dumps(scenes, sort_keys=True),
        "tokenizer": fingerprint(model_folder.find(config.tokenizer, "tokenizer")),
        "code": f"{model.num_tokens} x {model.bits}",
    }


def find_scene_codes(config: Config) -> Path | None:
    """Return the folder of the codes of training scenes; None where each step encodes them.

    That is so where `data.scenes.codes` is "", and where its codes are of other scenes or of
    another tokenizer.

    Args:
      config: of a generator.

    Raises:
      UserError: the codes, or the tokenizer, cannot be read.
    """
    if config.data.kind != "scenes" or not (given := config.data.scenes.codes):
        return None
    folder = scene_codes.DEMO_FOLDER if given == "demo" else Path(given)
    fitting = scene_codes.read_description(folder) == describe_scenes(config)
    return folder if fitting else None


def trains_on_codes(config: Config) -> bool:
    """Tell whether the steps of a stage read codes, and encode no images.

    Raises:
      UserError: see `find_scene_codes`.
    """
    if config.stage == "tokenizer":
        return False
    return config.data.kind == "codes" or find_scene_codes(config) is not None
