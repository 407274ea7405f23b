"""Pictures that have gone through the codes of a tokenizer, as a set to measure."""

import numpy as np

from instella_jax.codec.tokenizer import BinaryTokenizer
from instella_jax.evaluation.picture_sets import PictureSet


def reconstructed(tokenizer: BinaryTokenizer, pictures: PictureSet) -> PictureSet:
    """Return pictures of a size that the tokenizer takes as they come out of their codes, uint8."""

    def change(images: np.ndarray) -> np.ndarray:
        return tokenizer.decode(tokenizer.encode(images), *images.shape[1:3])

    names = [(*name, "through", tokenizer.fingerprint) for name in pictures.names]
    return PictureSet(names, pictures.read, change)
