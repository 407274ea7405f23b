"""instella-jax: 1D binary-latent text-to-image generation in JAX."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from instella_jax.codec.tokenizer import BinaryTokenizer as BinaryTokenizer
    from instella_jax.sampling.pipeline import InstellaPipeline as InstellaPipeline

__version__ = "0.2.0"
# The public surface, by the modules that hold it.
_PLACES = {
    "BinaryTokenizer": "instella_jax.codec.tokenizer",
    "InstellaPipeline": "instella_jax.sampling.pipeline",
}
__all__ = ["BinaryTokenizer", "InstellaPipeline", "__version__"]


def __getattr__(name: str) -> Any:
    """Import the public surface when it is asked for: jax takes half a second."""
    if name in _PLACES:
        return getattr(importlib.import_module(_PLACES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """List the public surface, imported or not."""
    return sorted({*globals(), *__all__})
