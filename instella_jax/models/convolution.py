"""Convolutions that are quick on a CPU too.

Axes: B batch, C channels, D channels of the result.
"""

import itertools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from instella_jax.models.attention import platform
from instella_jax.models.layers import Execution, partitioned

# Bytes of the columns that a product is made of, nine times those of the input.
_MOST = 2**28


def same_convolution(features: int, side: int, run: Execution, name: str) -> nn.Conv:
    """Return a convolution of 1 or 3 pixels a side that keeps the size of its maps."""
    return nn.Conv(
        features,
        (side, side),
        padding=side // 2,
        conv_general_dilated=convolve if side == 3 else None,
        dtype=run.dtype,
        param_dtype=run.param_dtype,
        kernel_init=partitioned(nn.initializers.he_normal(), (None, None, None, "embed")),
        bias_init=partitioned(nn.initializers.zeros_init(), (None,)),
        name=name,
    )


def convolve(
    x: Float[Array, "B h w C"],
    kernel: Float[Array, "3 3 C D"],
    strides: tuple[int, int],
    *arguments: Any,
    **options: Any,
) -> Float[Array, "B rows columns D"]:
    """Do what `jax.lax.conv_general_dilated` does for a 3x3 kernel and a border of zeros.

    `conv_general_dilated` of flax's `Conv`. On a CPU XLA's own takes many times as long where maps
    are smaller than the kernel, and for the kernel's gradient in a loop or a branch, as all of a
    training step is: there it is one product, unless that would take much memory.
    """
    _, height, width, channels = x.shape
    if platform() != "cpu" or 9 * x.size * x.dtype.itemsize > _MOST:
        return jax.lax.conv_general_dilated(x, kernel, strides, *arguments, **options)
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    shifts = itertools.product(range(3), repeat=2)
    down, right = strides
    around = [padded[:, i : i + height : down, j : j + width : right] for i, j in shifts]
    columns = jnp.concatenate(around, axis=-1)
    return jnp.dot(columns, kernel.reshape(9 * channels, -1), precision=options["precision"])
