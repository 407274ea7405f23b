"""3x3 convolutions that are quick on a CPU too.

Axes: B batch, C channels, D channels of the result.
"""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from instella_jax.models.attention import platform

# Bytes of the columns that a product is made of, nine times those of the input.
_MOST = 2**28


def convolve(
    x: Float[Array, "B h w C"], kernel: Float[Array, "3 3 C D"], *arguments: Any, **options: Any
) -> Float[Array, "B h w D"]:
    """Do what `jax.lax.conv_general_dilated` does for a 3x3 kernel and a border of zeros.

    `conv_general_dilated` of flax's `Conv`. On a CPU XLA's own takes many times as long where maps
    are smaller than the kernel, and for the kernel's gradient in a branch of `jax.lax.cond`: there
    it is one product, unless that would take much memory.
    """
    _, height, width, channels = x.shape
    if platform() != "cpu" or 9 * x.size * x.dtype.itemsize > _MOST:
        return jax.lax.conv_general_dilated(x, kernel, *arguments, **options)
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    shifts = itertools.product(range(3), repeat=2)
    around = [padded[:, i : i + height, j : j + width] for i, j in shifts]
    columns = jnp.concatenate(around, axis=-1)
    return jnp.dot(columns, kernel.reshape(9 * channels, -1), precision=options["precision"])
