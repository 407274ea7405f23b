"""Pictures that have gone through the codes of a tokenizer, as a set to measure."""

import dataclasses
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from instella_jax.errors import UserError
from instella_jax.evaluation.picture_sets import PictureSet
from instella_jax.models.layers import Execution
from instella_jax.models.tokenizer import BinaryTokenizer
from instella_jax.runtime.digest import digest
from instella_jax.stages.tokenizer import reconstruct
from instella_jax.weights import model_folder


@dataclasses.dataclass(frozen=True)
class LoadedTokenizer:
    """A tokenizer with its weights.

    Attributes:
      network: it.
      params: its parameters.
      side: pixels of a side that pictures are cropped to.
      digest: of the weights.
    """

    network: BinaryTokenizer
    params: Any
    side: int
    digest: str


def open_tokenizer(model: str, image_size: int = 0) -> LoadedTokenizer:
    """Load the tokenizer of a model folder.

    Args:
      model: the folder; "demo" is the shipped one.
      image_size: side of the pictures, 0 for the one that the folder says.

    Raises:
      UserError: there is none, or it does not take pictures of that size.
    """
    folder = model_folder.find(model, "tokenizer")
    description = model_folder.read_description(folder)
    sizes = model_folder.tokenizer_config(description.get("tokenizer", {}))
    side = image_size or int(description.get("image_size", 0))
    if not side:
        raise UserError(f"{folder} does not say its picture size; give --image-size=PIXELS")
    sizes.grid(side, side)
    network = BinaryTokenizer(sizes, Execution())
    params = model_folder.load(folder, "tokenizer", network, "float32")
    weights = digest(Path(model_folder.weights_path(folder, "tokenizer")))
    return LoadedTokenizer(network, params, side, weights)


def reconstructed(tokenizer: LoadedTokenizer, pictures: PictureSet) -> PictureSet:
    """Return pictures of the tokenizer's side as they come out of their codes, rounded to uint8."""

    def change(images: np.ndarray) -> np.ndarray:
        copies, _ = reconstruct(tokenizer.network, tokenizer.params, jnp.asarray(images))
        return np.asarray(copies)

    names = [(*name, "through", tokenizer.digest) for name in pictures.names]
    return PictureSet(names, pictures.read, change)
