"""Metrics on emoji scenes: reconstruction against PCA, images judged by their prompts' facts."""

import dataclasses
from typing import Any

import numpy as np

from instella_jax.config import Config
from instella_jax.data.scenes.source import heldout_prompts, render
from instella_jax.data.sources import scenes_source
from instella_jax.evaluation.judge import judge, summarise
from instella_jax.evaluation.pca import PcaCodec
from instella_jax.models.pixels import psnr
from instella_jax.models.tokenizer import TokenizerNetwork
from instella_jax.runtime import sharding
from instella_jax.sampling.options import options_from_config
from instella_jax.sampling.sampler import Sampler
from instella_jax.stages.tokenizer import reconstruct

PCA_PICTURES = 4_096
PROMPTS = 64
BATCH = 64


def mean_psnr(copies: np.ndarray, pictures: np.ndarray) -> float:
    """Return the mean over images of the PSNR in dB; both [n, h, w, 3], 0 to 255."""
    each = psnr(copies.astype(np.float64), pictures.astype(np.float64), span=255.0)
    return float(each.mean())


def through_code(network: TokenizerNetwork, params: Any, pictures: np.ndarray) -> np.ndarray:
    """Send pictures uint8 [n, h, w, 3] through their codes, a batch at a time."""
    parts = np.array_split(pictures, -(-len(pictures) // BATCH))
    return np.concatenate([sharding.fetch(reconstruct(network, params, p)[0]) for p in parts])


def tokenizer_report(network: TokenizerNetwork, params: Any, config: Config) -> dict[str, float]:
    """Return held-out PSNR of the tokenizer and of PCA with as many bits, in dB."""
    heldout, train = (scenes_source(config.data, split) for split in ("heldout", "train"))
    pictures = np.stack([heldout[i]["image"] for i in range(512)])
    fitted = np.stack([train[i]["image"] for i in range(PCA_PICTURES)])
    bits = network.config.num_tokens * network.config.bits
    codec = PcaCodec(fitted.reshape(len(fitted), -1).astype(np.float32), bits)
    coded = codec(pictures.reshape(len(pictures), -1)).reshape(pictures.shape)
    return {
        "psnr": mean_psnr(through_code(network, params, pictures), pictures),
        "psnr_pca": mean_psnr(np.clip(np.round(coded), 0, 255), pictures),
    }


@dataclasses.dataclass(frozen=True)
class PromptsReport:
    """Images of held-out prompts, judged.

    Attributes:
      sampled: share of pictures that are right in background, objects, count and position.
      ceiling: the same of true pictures that have gone through the tokenizer.
      pictures: the images, uint8 [n, h, w, 3].
      prompts: the n prompts.
    """

    sampled: dict[str, float]
    ceiling: dict[str, float]
    pictures: np.ndarray
    prompts: list[str]


def prompts_report(sampler: Sampler, config: Config, count: int = PROMPTS) -> PromptsReport:
    """Sample held-out prompts and judge the images by the facts the prompts were made of."""
    scenes = config.data.scenes
    prompts = heldout_prompts(
        count,
        config.data.seed,
        scenes.concepts,
        tuple(scenes.styles),
        scenes.places,
        scenes.max_objects,
    )
    texts, facts = [text for text, _ in prompts], [scene for _, scene in prompts]
    images = sampler(texts, options_from_config(config.sample))
    true = np.stack([render(scene, config.data.image_size) for scene in facts])
    copies = through_code(sampler.tokenizer, sampler.params["tokenizer"], true)
    return PromptsReport(
        summarise(judge(images, facts)), summarise(judge(copies, facts)), images, texts
    )
