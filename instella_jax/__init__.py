"""instella-jax: 1D binary-latent text-to-image generation in JAX."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from instella_jax.sampling.pipeline import InstellaPipeline as InstellaPipeline

__version__ = "0.1.0"
__all__ = ["InstellaPipeline", "__version__"]


def __getattr__(name: str) -> Any:
    """Import the public surface when it is asked for: jax takes half a second."""
    if name == "InstellaPipeline":
        from instella_jax.sampling.pipeline import InstellaPipeline

        return InstellaPipeline
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """List the public surface, imported or not."""
    return sorted({*globals(), *__all__})
