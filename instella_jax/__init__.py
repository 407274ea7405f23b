"""instella-jax: 1D binary-latent text-to-image generation in JAX."""

__version__ = "0.1.0"
