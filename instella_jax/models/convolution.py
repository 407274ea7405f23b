"""Convolutions that are quick on a CPU too.

Axes: B batch, C channels, D channels of the result.
"""

import functools
import itertools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from instella_jax.models.attention import platform
from instella_jax.models.layers import Execution, partitioned

# From so many pixels a side on, XLA's own convolution is as quick as a product, forwards; from so
# many channels on it is not.
_LARGE, _WIDE = 16, 768


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

    `conv_general_dilated` of flax's `Conv`. On a CPU XLA's own takes up to a hundred times as long
    for the gradients, the kernel's above all, in a loop or a branch, as all of a training step is,
    and many times as long for maps smaller than the kernel; of many channels, a fifth longer. There
    this is made of products.
    """
    xla = functools.partial(jax.lax.conv_general_dilated, **options)
    product = functools.partial(_product, strides=strides, precision=options["precision"])
    if platform() != "cpu":
        return xla(x, kernel, strides, *arguments)
    if min(x.shape[1:3]) < _LARGE:
        return product(x, kernel, taps=9)

    by_rows = functools.partial(product, taps=3)

    @jax.custom_vjp
    def mixed(x: Array, kernel: Array) -> Array:
        wide = x.shape[-1] >= _WIDE
        return by_rows(x, kernel) if wide else xla(x, kernel, strides, *arguments)

    def backward(inputs: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
        return jax.vjp(by_rows, *inputs)[1](gradient)

    mixed.defvjp(lambda x, kernel: (mixed(x, kernel), (x, kernel)), backward)
    return mixed(x, kernel)


def _product(
    x: Float[Array, "B h w C"],
    kernel: Float[Array, "3 3 C D"],
    strides: tuple[int, int],
    precision: Any,
    taps: int,
) -> Float[Array, "B rows columns D"]:
    """Return the convolution as a sum of products, each with so many of the kernel's nine taps.

    Fewer taps take less memory: each product holds that many copies of the map.
    """
    _, height, width, channels = x.shape
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    down, right = strides
    shifts = itertools.product(range(3), repeat=2)
    around = [padded[:, i : i + height : down, j : j + width : right] for i, j in shifts]
    weights = kernel.reshape(-1, taps * channels, kernel.shape[-1])
    products = [
        jnp.dot(
            jnp.concatenate(around[at * taps : (at + 1) * taps], axis=-1),
            weights[at],
            precision=precision,
        )
        for at in range(9 // taps)
    ]
    return functools.reduce(jnp.add, products)
