"""What bits allow beside text to image: variations, blends of prompts, edits of tokens, animations.

Axes: N latent tokens, K bits of each.
"""

import os
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from instella_jax.errors import UserError, value_errors
from instella_jax.runtime.files import write_bytes
from instella_jax.runtime.sharding import fetch
from instella_jax.sampling.generation import Start
from instella_jax.sampling.options import Request
from instella_jax.sampling.pipeline import InstellaPipeline, PipelineOutput, make_requests


def _code(pipe: InstellaPipeline, code: np.ndarray) -> np.ndarray:
    """Return a code as bool [N, K].

    Raises:
      UserError: it is of another shape or holds other values.
    """
    network = pipe.sampler.generator
    shape = (network.num_tokens, network.bits)
    code = np.asarray(code)
    if code.shape == (1, *shape):
        code = code[0]
    if code.shape != shape:
        raise UserError(f"the code has the shape {list(code.shape)}: expected {list(shape)}")
    if not np.isin(code, (0, 1)).all():
        raise UserError("the code holds other values than 0 and 1")
    return code.astype(bool)


def _sample(
    pipe: InstellaPipeline,
    requests: Sequence[Request],
    code: np.ndarray,
    keep: np.ndarray | None,
    step: int,
    settings: dict[str, Any],
) -> PipelineOutput:
    """Sample pictures that start from one code."""
    options = pipe.options(**settings)
    sampler, count = pipe.sampler, len(requests)
    height, width = sampler.size(options)
    texts = [r.prompt for r in requests] + [r.negative_prompt for r in requests]
    seeds = [request.seed for request in requests]
    start = Start(
        np.broadcast_to(code, (count, *code.shape)).astype(np.float32),
        None if keep is None else np.broadcast_to(keep, (count, *keep.shape)),
        step,
    )
    codes = sampler.sample(texts, np.array(seeds), options, start=start)
    pixels = sampler.decode(codes, height, width)
    images = [Image.fromarray(picture) for picture in pixels]
    return PipelineOutput(images, fetch(codes) > 0.5, seeds)


@value_errors()
def vary(
    pipe: InstellaPipeline,
    code: np.ndarray,
    prompt: str,
    *,
    strength: float = 0.5,
    count: int = 1,
    seed: int = 0,
    negative_prompt: str | None = None,
    **settings: Any,
) -> PipelineOutput:
    """Return variations of a picture: its code gets the noise of a time, then it is denoised.

    Args:
      pipe: of a diffusion model.
      code: bits [N, K] of the picture, a pipeline's or `pipe.tokenizer.encode`'s.
      prompt: what the variations show.
      strength: the share of the steps that is taken, from 0, which changes nothing, to 1, which
        leaves nothing.
      count: how many.
      seed: of the first; the others have the following ones.
      negative_prompt: what guidance leads away from.
      settings: num_inference_steps, guidance_scale, height and others of a pipeline's call.

    Raises:
      ValueError: the model is autoregressive, or an argument is out of its range.
    """
    if pipe.kind != "diffusion":
        raise UserError(
            "an autoregressive model has no noise to vary a picture by: use regenerate, which "
            "keeps some of the tokens"
        )
    if not 0 <= strength <= 1:
        raise UserError(f"strength is {strength!r}: expected a number from 0 to 1")
    steps = pipe.options(**settings).steps
    first = steps - round(steps * strength)
    requests = make_requests(prompt, negative_prompt, seed, count)
    return _sample(pipe, requests, _code(pipe, code), None, first, settings)


@value_errors()
def regenerate(
    pipe: InstellaPipeline,
    code: np.ndarray,
    keep: np.ndarray | Sequence[bool],
    prompt: str,
    *,
    count: int = 1,
    seed: int = 0,
    negative_prompt: str | None = None,
    **settings: Any,
) -> PipelineOutput:
    """Return pictures that keep some tokens of a code, bit by bit, and have new ones elsewhere.

    >>> pipe = InstellaPipeline.from_pretrained("demo")
    >>> (code,) = pipe("a cat above a blue square", num_inference_steps=2).codes
    >>> keep = np.arange(16) < 8
    >>> other = regenerate(pipe, code, keep, "a cat above a pizza", num_inference_steps=2)
    >>> bool((other.codes[0][keep] == code[keep]).all()), other.images[0].size
    (True, (64, 64))

    A diffusion model makes the new tokens fit all that are kept; an autoregressive one those before
    them.

    Args:
      pipe: of either kind.
      code: bits [N, K] of a picture.
      keep: bool [N], the tokens that stay.
      prompt: what the whole picture shows.
      count: how many.
      seed: of the first; the others have the following ones.
      negative_prompt: what guidance leads away from.
      settings: num_inference_steps, guidance_scale, height and others of a pipeline's call.

    Raises:
      ValueError: an argument is out of its range or does not fit.
    """
    code = _code(pipe, code)
    keep = np.asarray(keep, bool)
    if keep.shape != code.shape[:1]:
        raise UserError(
            f"keep has the shape {list(keep.shape)}: expected [{len(code)}], one a token"
        )
    requests = make_requests(prompt, negative_prompt, seed, count)
    return _sample(pipe, requests, code, keep, 0, settings)


@value_errors()
def blend(
    pipe: InstellaPipeline,
    first: str,
    second: str,
    *,
    count: int = 5,
    seed: int = 0,
    negative_prompt: str | None = None,
    **settings: Any,
) -> PipelineOutput:
    """Return pictures on the way from one prompt to another, all with the same random numbers.

    In between the logits of both are weighed, so that the bits follow the product of the two
    distributions, each to its share.

    Args:
      pipe: of either kind.
      first: the prompt of the first picture.
      second: that of the last.
      count: how many pictures, at least 2.
      seed: of all.
      negative_prompt: what guidance leads away from.
      settings: num_inference_steps, guidance_scale, height and others of a pipeline's call.

    Raises:
      ValueError: an argument is out of its range.
    """
    if count < 2:
        raise UserError(f"count is {count!r}: expected at least 2, both ends")
    options = pipe.options(**settings)
    height, width = pipe.sampler.size(options)
    texts = [first, second, negative_prompt or ""]
    (request,) = make_requests(first, negative_prompt, seed, 1)
    codes = [
        fetch(pipe.sampler.sample(texts, np.array([request.seed]), options, blend=share))
        for share in np.linspace(0.0, 1.0, count).tolist()
    ]
    pictures = [pipe.sampler.decode(code, height, width)[0] for code in codes]
    images = [Image.fromarray(picture) for picture in pictures]
    return PipelineOutput(images, np.concatenate(codes) > 0.5, [seed] * count)


@value_errors()
def watch(
    pipe: InstellaPipeline, prompt: str, *, seed: int = 0, **settings: Any
) -> list[Image.Image]:
    """Return the pictures of a generation: of the bits after each step, the last being the picture.

    Args:
      pipe: of either kind.
      prompt: what to generate.
      seed: of the picture.
      settings: of a pipeline's call.

    Raises:
      ValueError: an argument is out of its range.
    """
    height, width = pipe.sampler.size(
        pipe.options(height=settings.get("height"), width=settings.get("width"))
    )
    codes: list[np.ndarray] = []

    def collect(_: InstellaPipeline, step: int, total: int, values: dict[str, Any]) -> None:
        codes.append(values["codes"].astype(np.float32))

    pipe(prompt, seed=seed, output_type="codes", callback_on_step_end=collect, **settings)
    return [Image.fromarray(pipe.sampler.decode(code, height, width)[0]) for code in codes]


def save_gif(
    path: str | os.PathLike[str],
    frames: Sequence[Image.Image],
    *,
    milliseconds: int = 100,
    last: int = 1_500,
    zoom: int = 1,
) -> None:
    """Write frames as a GIF that is played for ever, whole or not at all.

    Args:
      path: of the file.
      frames: pictures of one size.
      milliseconds: how long each is shown.
      last: the same of the last one.
      zoom: how many pixels a pixel becomes on each side.
    """
    size = [zoom * side for side in frames[0].size]
    big = [frame.resize((size[0], size[1]), Image.Resampling.NEAREST) for frame in frames]
    durations = [milliseconds] * (len(frames) - 1) + [last]
    data = BytesIO()
    big[0].save(
        data, "GIF", save_all=True, append_images=big[1:], duration=durations, loop=0,
        disposal=1, optimize=True,
    )  # fmt: skip
    write_bytes(Path(path), data.getvalue())
