"""The networks in a model folder, and whether they are those that a config describes."""

import dataclasses
import json
import os
from collections.abc import Mapping
from typing import Any

from instella_jax.errors import UserError
from instella_jax.models.ar_transformer import ArTransformer
from instella_jax.models.diffusion_transformer import DiffusionTransformer
from instella_jax.models.functional import Network
from instella_jax.models.layers import Execution
from instella_jax.models.olmo import Olmo, OlmoConfig
from instella_jax.models.tokenizer import TokenizerNetwork
from instella_jax.weights import model_folder

GENERATORS = {"diffusion": DiffusionTransformer, "ar": ArTransformer}
# What a description says of a part beside the sizes of its network.
_BESIDE = ("kind", "max_length", "pad_token_id")


def text_sizes(values: Mapping[str, Any]) -> OlmoConfig:
    """Read the sizes of a text encoder; a `clip_qkv` of 0 is none."""
    plain = {key: value for key, value in values.items() if key not in _BESIDE}
    sizes = model_folder.build(OlmoConfig, plain, "text.model")
    return dataclasses.replace(sizes, clip_qkv=sizes.clip_qkv or None)


def find_generator(
    folder: str | os.PathLike[str], description: Mapping[str, Any], kind: str | None = None
) -> str:
    """Return the name of the generator part of a kind, or of any kind, diffusion first.

    Raises:
      UserError: there is none.
    """
    kinds = {
        part: description[part].get("kind")
        for part in ("generator", *GENERATORS)
        if isinstance(description.get(part), Mapping)
    }
    for part, found in kinds.items():
        if found in GENERATORS and kind in (None, found):
            return part
    wanted = "generator" if kind is None else f"generator of the kind {kind!r}"
    there = ", ".join(map(repr, kinds.values())) or "none"
    raise UserError(f"model folder {folder} has no {wanted}; generators there: {there}")


def make_network(
    folder: str | os.PathLike[str], description: Mapping[str, Any], part: str, run: Execution
) -> Network:
    """Build the network of a part.

    Raises:
      UserError: the folder does not describe the part, or describes it wrongly.
    """
    values = description.get(part)
    if not isinstance(values, Mapping):
        raise UserError(f"model folder {folder} has no {part}")
    if part == "tokenizer":
        return TokenizerNetwork(model_folder.tokenizer_config(values), run)
    text = description.get("text")
    if not isinstance(text, Mapping):
        raise UserError(f"model folder {folder} has no text")
    if part == "text":
        return Olmo(text_sizes(text), run)
    kind = GENERATORS.get(values.get("kind", ""))
    if kind is None:
        raise UserError(
            f"model folder {folder} has a generator of unknown kind {values.get('kind')!r}"
        )
    sizes = {key: value for key, value in values.items() if key not in _BESIDE}
    try:
        return kind(**sizes, text_width=text_sizes(text).hidden_size, run=run)
    except TypeError as error:
        raise UserError(
            f"model folder {folder}: the sizes of {part} do not fit ({error})"
        ) from None


def matching_part(
    folder: str | os.PathLike[str], part: str, wanted: Mapping[str, Any], key: str
) -> str:
    """Return the name in a folder of the part that a config describes.

    Args:
      folder: a model folder.
      part: "tokenizer", "generator" or "text".
      wanted: the config's sizes of it, as a description has them.
      key: the config's section of these sizes, for messages.

    Raises:
      UserError: the folder lacks it, or has it in other sizes.
    """
    description = model_folder.read_description(folder)
    name = part
    if part == "generator":
        name = find_generator(folder, description, wanted["kind"])
    found = description.get(name)
    if not isinstance(found, Mapping):
        raise UserError(f"model folder {folder} has no {part}")
    theirs, ours = json.loads(json.dumps([dict(found), dict(wanted)]))
    for size in sorted(theirs.keys() & ours.keys() - set(_BESIDE)):
        if (theirs[size] or 0) != (ours[size] or 0):
            raise UserError(
                f"{folder} has a {part} with {size}={theirs[size]!r}, config.{key}.{size} is "
                f"{ours[size]!r}: give --config.{key}.{size}={theirs[size]!r} or another folder"
            )
    return name


def check_target(folder: str | os.PathLike[str], wanted: Mapping[str, Any]) -> None:
    """Check that the generator of a folder predicts what a config says.

    Args:
      folder: a model folder; where it says nothing, its diffusion generator predicts "epsilon".
      wanted: the config's description, with a "target" for a diffusion generator.

    Raises:
      UserError: it predicts something else.
    """
    theirs = model_folder.read_description(folder).get("target", "epsilon")
    ours = wanted.get("target", theirs)
    if theirs != ours:
        raise UserError(
            f"the generator of {folder} predicts {theirs!r}, config.loss.target is {ours!r}: give "
            f"--config.loss.target={theirs}"
        )
