"""What a picture says of how it was made, so that it can be made again to the bit."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from instella_jax.errors import UserError
from instella_jax.sampling.card import version
from instella_jax.sampling.load import Weights
from instella_jax.sampling.options import Options, Request
from instella_jax.sampling.sampler import Sampler

# Keyword of the PNG chunk that holds a record as JSON.
KEYWORD = "instella_jax"
# Settings of the diffusion sampler alone.
_DIFFUSION = ("steps", "rho", "protocol")


def make_record(
    sampler: Sampler,
    weights: Weights,
    request: Request,
    options: Options,
    batch: int,
    text_tokens: int,
) -> dict[str, Any]:
    """Return the record of a picture.

    Args:
      sampler: what makes it.
      weights: of the sampler.
      request: its prompts and seed.
      options: its settings.
      batch: how many pictures were sampled at once: sums are in another order in another batch.
      text_tokens: what prompts were padded to, for the same reason.
    """
    height, width = sampler.size(options)
    names = ("guidance", "temperature", "kernel")
    if sampler.kind == "diffusion":
        names += _DIFFUSION
    return {
        "text": request.prompt,
        "negative_prompt": request.negative_prompt,
        "seed": request.seed,
        **{name: getattr(options, name) for name in names},
        "height": height,
        "width": width,
        "kind": sampler.kind,
        "dtype": str(sampler.generator.run.dtype),
        "weights": weights.record(),
        "batch": batch,
        "text_tokens": text_tokens,
        "made_with": {
            "instella_jax": version(),
            "jax": jax.__version__,
            "platform": jax.default_backend(),
        },
    }


def as_texts(record: Mapping[str, Any]) -> dict[str, str]:
    """Return the texts of a PNG file with a record."""
    return {
        "Description": record["text"],
        "Software": f"instella-jax {record['made_with']['instella_jax']}",
        KEYWORD: json.dumps(record, ensure_ascii=False),
    }


def read_record(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read the record in a PNG file.

    Raises:
      UserError: it cannot be read, or has none.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(Path(path)) as picture:
            picture.load()
            text = getattr(picture, "text", {}).get(KEYWORD)
    except UnidentifiedImageError:
        raise UserError(f"{path} is no picture") from None
    except (OSError, ValueError, SyntaxError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot read {path} ({reason})") from None
    try:
        record = json.loads(text or "")
        complete = all(name in record for name in ("text", "seed", "weights", "batch", "guidance"))
    except (ValueError, TypeError):
        complete, record = False, {}
    if not complete:
        raise UserError(
            f"{path} does not say how it was made: expected a PNG file of instella-jax generate"
        )
    return record
