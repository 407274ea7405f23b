"""Images as networks see them, and how far two of them are apart.

Axes: B batch.
"""

import jax
import jax.numpy as jnp


def to_float(images: jax.Array) -> jax.Array:
    """Map uint8 pictures to float32 in [-1, 1]."""
    return images.astype(jnp.float32) / 127.5 - 1.0


def to_uint8(images: jax.Array) -> jax.Array:
    """Map pictures in [-1, 1], clipped, to uint8."""
    clipped = jnp.clip(images.astype(jnp.float32), -1.0, 1.0)
    return jnp.round((clipped + 1.0) * 127.5).astype(jnp.uint8)


def psnr(a: jax.Array, b: jax.Array) -> jax.Array:
    """Return peak signal-to-noise ratio in dB of pictures in [-1, 1]: [B, h, w, 3] twice -> [B]."""
    mse = jnp.mean(jnp.square(a - b), axis=(1, 2, 3))
    return 10.0 * jnp.log10(4.0 / jnp.maximum(mse, 1e-10))
