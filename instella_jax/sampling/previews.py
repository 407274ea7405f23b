"""Images that show where the training of a stage stands."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from instella_jax.models.functional import Params
from instella_jax.runtime.sharding import fetch
from instella_jax.sampling.pipeline import InstellaPipeline, options_from_config
from instella_jax.stages.base import Stage
from instella_jax.stages.generator import GeneratorStage
from instella_jax.stages.tokenizer import TokenizerStage, reconstruct

Captioned = tuple[list[np.ndarray], list[str]]


@functools.singledispatch
def preview(stage: Stage, params: Params, frozen: Params, count: int) -> Captioned:
    """Return images, uint8 [h, w, 3], and their captions, made with a stage's parameters.

    Args:
      stage: what is trained.
      params: its trained parameters.
      frozen: its frozen ones.
      count: how many held-out samples to show.
    """
    raise TypeError(f"{type(stage).__name__} has no preview")


@preview.register
def _(stage: TokenizerStage, params: Params, frozen: Params, count: int) -> Captioned:
    """Return held-out images, each followed by its reconstruction."""
    del frozen
    originals = next(stage.loader("heldout", batch_size=count, drop_remainder=False))["image"]
    copies, quality = fetch(reconstruct(stage.network, params["tokenizer"], jnp.asarray(originals)))
    images, captions = [], []
    for image, copy, decibel in zip(originals, copies, quality, strict=True):
        images += [image, copy]
        captions += ["original", f"{decibel:.1f} dB"]
    return images, captions


@preview.register
def _(stage: GeneratorStage, params: Params, frozen: Params, count: int) -> Captioned:
    """Sample the first held-out captions with the config's sampling settings."""
    texts = next(stage.loader("heldout", batch_size=count, drop_remainder=False))["text"]
    mesh = jax.sharding.get_mesh()
    pipeline = InstellaPipeline.from_stage(
        stage, {**frozen, **params}, None if mesh.empty else mesh
    )
    return list(pipeline(texts, options_from_config(stage.config.sample))), texts
