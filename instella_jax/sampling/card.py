"""The model card of a model folder: `README.md`, from its sizes and its measured results."""

import sys
from collections.abc import Mapping
from typing import Any

import jax

from instella_jax.sampling.sampler import Sampler

_CARD = """\
---
library_name: instella-jax
pipeline_tag: text-to-image
tags:
- instella-jax
- jax
- text-to-image
- binary-latents
---

# {title}

Prompts to pictures of {side} x {side} pixels by {process} over {tokens} latent tokens of {bits}
bits ({bytes} bytes a picture), for instella-jax {version}
([arXiv 2506.21022](https://arxiv.org/abs/2506.21022)).

```python
from instella_jax import InstellaPipeline

pipe = InstellaPipeline.from_pretrained("THIS FOLDER OR ITS ID")
image = pipe("{prompt}").images[0]
```

## Parts

| folder | what | parameters |
|---|---|---|
{parts}

Prompts have at most {max_length} tokens. Sampled by default with guidance_scale {scale:g} (the
published guidance g is {guidance:g}), temperature {temperature:g}{rho}. {words}

## Results

{results}

## Limits

What this model was trained on bounds what it shows: an unknown word is spelled in pieces, and what
it makes of one means little. Nothing filters prompts or pictures.
"""

_NAMES = {
    "generator": "makes codes of text features",
    "text_encoder": "makes features of prompts (OLMo)",
    "tokenizer": "makes pictures of codes, and codes of pictures",
}
_PROCESSES = {"diffusion": "binary diffusion", "ar": "autoregression"}


def version() -> str:
    """Return the version of this package, which is imported by now."""
    return sys.modules["instella_jax"].__version__


def model_card(sampler: Sampler, description: Mapping[str, Any]) -> str:
    """Return the card of a model.

    Args:
      sampler: with its networks.
      description: of the generator's folder, with its "sampling" and perhaps "results".
    """
    generator = sampler.generator
    params = {"generator": "generator", "text_encoder": "text", "tokenizer": "tokenizer"}
    parts = [
        f"| `{folder}` | {_NAMES[folder]} | {_count(sampler.params[part]):,} |"
        for folder, part in params.items()
    ]
    sampling = description["sampling"]
    words = sampler.text_tokenizer.words
    known = f"It knows {len(words)} words, such as {', '.join(words[:: len(words) // 8 + 1])}."
    return _CARD.format(
        title=f"Text to image by {_PROCESSES[sampler.kind]}",
        side=sampler.image_size,
        process=_PROCESSES[sampler.kind],
        tokens=generator.num_tokens,
        bits=generator.bits,
        bytes=generator.num_tokens * generator.bits // 8,
        version=version(),
        prompt="a cat above a blue square",
        parts="\n".join(parts),
        max_length=sampler.max_length,
        scale=1 + sampling["guidance"],
        guidance=sampling["guidance"],
        temperature=sampling["temperature"],
        rho=f" and rho {sampling['rho']:g}" if "rho" in sampling else "",
        words=known if words else "",
        results=_results(description.get("results", {})),
    )


def _count(params: Any) -> int:
    return sum(x.size for x in jax.tree.leaves(params))


def _results(results: Mapping[str, Any]) -> str:
    if not results:
        return "None were recorded with these weights."
    rows = (f"| {name.replace('_', ' ')} | {_figure(value)} |" for name, value in results.items())
    return "\n".join(["| measured | figure |", "|---|---|", *rows])


def _figure(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
