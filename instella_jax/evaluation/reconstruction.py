"""How well a tokenizer gives pictures back: PSNR, SSIM, and LPIPS where its weights are there.

What is compared are the pixels that the tokenizer was given and those that it returns, both uint8,
each picture by itself; means and deviations are taken in float64.

Axes: B pictures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from instella_jax.codec.tokenizer import BinaryTokenizer
from instella_jax.errors import UserError
from instella_jax.losses.perceptual import lpips
from instella_jax.models.functional import Params
from instella_jax.models.pixels import SSIM_SIDE, psnr, ssim, to_float

# What each figure is, in words.
MEANING = {
    "psnr": "dB, of values from 0 to 255, over all pixels and channels of a picture; at most 106",
    "ssim": "of values from 0 to 1, in RGB, Gaussian window of 11x11 pixels with deviation 1.5 (as "
    "scikit-image's with gaussian_weights and without sample covariance)",
    "lpips": "VGG16, version 0.1",
}


@jax.jit
def distances(
    images: UInt8[Array, "B height width 3"],
    copies: UInt8[Array, "B height width 3"],
    lpips_params: Params | None,
) -> dict[str, Float[Array, " B"]]:
    """Return the figures of each pair; LPIPS where its parameters are given."""
    x, y = to_float(images), to_float(copies)
    found = {"psnr": psnr(y, x)}
    if min(images.shape[1:3]) >= SSIM_SIDE:
        found["ssim"] = ssim((y + 1) / 2, (x + 1) / 2)
    if lpips_params is not None:
        found["lpips"] = lpips(lpips_params, y, x)
    return found


def figures(images: np.ndarray, copies: np.ndarray, lpips_params: Params | None) -> dict[str, Any]:
    """Return the figures of pairs of pictures uint8 [B, h, w, 3], of any number: float64 [B]."""
    found = jax.device_get(distances(jnp.asarray(images), jnp.asarray(copies), lpips_params))
    return {name: np.asarray(values, np.float64) for name, values in found.items()}


def measure(
    tokenizer: BinaryTokenizer,
    batches: Iterable[np.ndarray],
    *,
    tokens: int = 0,
    lpips_params: Params | None = None,
    show: Callable[[int], None] = lambda done: None,
) -> dict[str, Any]:
    """Send pictures through their codes and compare.

    Args:
      tokenizer: what encodes and decodes.
      batches: uint8 [B, height, width, 3], sides as the tokenizer takes them; the last may be
        shorter, and is filled up where it is.
      tokens: how many of a code are decoded, the first ones; 0: all.
      lpips_params: what `load_lpips` returns; None: LPIPS is left out.
      show: is given how many pictures are done.

    Returns:
      "pictures", "image_size" (height, width), "bits" of a picture, "bits_per_pixel"; under
      "scores" the mean of each figure, under "deviations" its standard deviation over pictures,
      under "worst" its worst; "bits_on", the share of bits that are 1, and "constant_bits", how
      many bits never change.

    Raises:
      UserError: there is no picture, or the tokenizer was not trained for so few tokens.
    """
    tokenizer.check_tokens(tokens)
    tokens = tokens or tokenizer.num_tokens
    found: dict[str, list[np.ndarray]] = {}
    on: Any = 0
    count, most, size = 0, 0, (0, 0)
    for images in batches:
        most, rows, size = max(most, len(images)), len(images), images.shape[1:3]
        # So that one shape is compiled.
        full = np.concatenate([images, np.repeat(images[-1:], most - rows, axis=0)])
        codes = tokenizer.encode(full)[:, :tokens]
        copies = tokenizer.decode(codes, *size)
        for name, values in figures(full, copies, lpips_params).items():
            found.setdefault(name, []).append(values[:rows])
        on = on + codes[:rows].sum(0, dtype=np.int64)
        count += rows
        show(count)
    if not count:
        raise UserError("there are no pictures to measure the tokenizer on")
    values = {name: np.concatenate(parts) for name, parts in found.items()}
    bits = tokens * tokenizer.bits
    worst = {name: float(v.max() if name == "lpips" else v.min()) for name, v in values.items()}
    return {
        "pictures": count,
        "image_size": [int(side) for side in size],
        "bits": bits,
        "bits_per_pixel": bits / (size[0] * size[1]),
        "scores": {name: float(v.mean()) for name, v in values.items()},
        "deviations": {name: float(v.std()) for name, v in values.items()},
        "worst": worst,
        "bits_on": float(on.sum() / (count * bits)),
        "constant_bits": int(np.sum((on == 0) | (on == count))),
    }


def table_rows(report: dict[str, Any]) -> list[tuple[str, float, float, float]]:
    """Return (measure, mean, standard deviation, worst picture) of each figure."""
    return [
        (name, value, report["deviations"][name], report["worst"][name])
        for name, value in report["scores"].items()
    ]
