"""Images that show where the training of a stage stands."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from instella_jax.models.functional import Params
from instella_jax.runtime.sharding import fetch
from instella_jax.sampling.options import options_from_config
from instella_jax.sampling.sampler import Sampler
from instella_jax.stages.generator import GeneratorStage
from instella_jax.stages.tokenizer import TokenizerStage, reconstruct


class Preview(NamedTuple):
    """Images to show in a grid.

    Attributes:
      images: uint8 [n, h, w, 3].
      captions: n texts.
      together: how many images in a row belong together.
    """

    images: np.ndarray
    captions: list[str]
    together: int = 1


@functools.singledispatch
def preview(stage: object, params: Params, frozen: Params, count: int) -> Preview:
    """Make images with a stage's parameters.

    Args:
      stage: what is trained.
      params: its trained parameters.
      frozen: its frozen ones.
      count: how many held-out samples to show.
    """
    raise TypeError(f"{type(stage).__name__} has no preview")


@preview.register
def _(stage: TokenizerStage, params: Params, frozen: Params, count: int) -> Preview:
    """Return held-out images, each followed by its reconstruction and their difference.

    Half of the difference is laid over grey: what is the same is grey.
    """
    del frozen
    originals = next(stage.loader("heldout", batch_size=count, drop_remainder=False))["image"]
    copies, quality = fetch(reconstruct(stage.network, params["tokenizer"], jnp.asarray(originals)))
    apart = (255 + copies.astype(np.int16) - originals) // 2
    triples = np.stack([originals, copies, apart.astype(np.uint8)], axis=1)
    captions = [
        text for decibel in quality for text in ("original", f"{decibel:.1f} dB", "difference")
    ]
    return Preview(triples.reshape(-1, *originals.shape[1:]), captions, together=3)


@preview.register
def _(stage: GeneratorStage, params: Params, frozen: Params, count: int) -> Preview:
    """Sample the first held-out captions with the config's sampling settings."""
    texts = next(stage.loader("heldout", batch_size=count, drop_remainder=False))["text"]
    mesh = jax.sharding.get_mesh()
    sampler = Sampler.from_stage(stage, {**frozen, **params}, None if mesh.empty else mesh)
    return Preview(sampler(texts, options_from_config(stage.config.sample)), texts)
