"""Images as networks see them, and how far two of them are apart.

Axes: B batch.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, UInt8

Images = Float[Array, "B height width 3"] | Float[np.ndarray, "B height width 3"]


def to_float(images: UInt8[Array, "*axes"]) -> Float32[Array, "*axes"]:
    """Map uint8 to [-1, 1]."""
    return images.astype(jnp.float32) / 127.5 - 1.0


def to_uint8(images: Float[Array, "*axes"]) -> UInt8[Array, "*axes"]:
    """Map [-1, 1], clipped, to uint8."""
    clipped = jnp.clip(images.astype(jnp.float32), -1.0, 1.0)
    return jnp.round((clipped + 1.0) * 127.5).astype(jnp.uint8)


def psnr(a: Images, b: Images, span: float = 2.0) -> Float[Array, " B"]:
    """Return the peak signal-to-noise ratio in dB, 106 for images that are the same.

    Args:
      a: images.
      b: what they should be.
      span: of the values from black to white, 2 for [-1, 1].
    """
    mse = (((a - b) / span) ** 2).mean(axis=(1, 2, 3))
    return -10.0 * jnp.log10(jnp.maximum(mse, 2.5e-11))
