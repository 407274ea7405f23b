"""Distances of images pixel by pixel.

Axes: B batch.
"""

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

KINDS = ("smooth_l1", "l1", "l2")


def pixel_loss(
    kind: str,
    images: Float[Array, "B height width 3"],
    targets: Float[Array, "B height width 3"],
) -> Float[Array, ""]:
    """Return the mean of |d|, d^2, or smooth-L1: d^2 / 2 up to |d| = 1 and |d| - 1/2 above.

    Args:
      kind: "smooth_l1", "l1" or "l2".
      images: in [-1, 1], about.
      targets: what they should be.
    """
    if kind == "smooth_l1":
        return jnp.mean(optax.huber_loss(images, targets, delta=1.0))
    difference = images - targets
    return jnp.mean(jnp.abs(difference) if kind == "l1" else jnp.square(difference))
