"""The 3x3 convolution as a product, against XLA's and against loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from instella_jax.models import convolution, trunk
from instella_jax.models.layers import Execution


def by_loops(x, kernel, stride):
    batch, height, width, _ = x.shape
    result = np.zeros((batch, -(-height // stride), -(-width // stride), kernel.shape[-1]))
    for row in range(result.shape[1]):
        for column in range(result.shape[2]):
            for i in range(3):
                for j in range(3):
                    r, c = stride * row + i - 1, stride * column + j - 1
                    if 0 <= r < height and 0 <= c < width:
                        result[:, row, column] += x[:, r, c] @ kernel[i, j]
    return result


def products_and_convolutions(function, *arguments):
    text = jax.jit(function).lower(*arguments).as_text()
    return text.count("stablehlo.dot_general"), text.count("stablehlo.convolution")


@pytest.mark.parametrize(("height", "width"), [(1, 1), (2, 5), (6, 3)])
@pytest.mark.parametrize(
    # From how many pixels and channels on, and products and convolutions forwards and in all: each
    # product has two gradients.
    ("large", "wide", "forwards", "both"),
    [(7, 5, (1, 0), (1 + 2, 0)), (0, 5, (0, 1), (2 * 3, 1)), (0, 4, (3, 0), (3 + 2 * 3, 0))],
    ids=["small", "large", "wide"],
)
@pytest.mark.parametrize("stride", [1, 2])
def test_value_and_gradients_are_those_of_loops_and_of_xla(
    height, width, large, wide, forwards, both, stride, monkeypatch
):
    monkeypatch.setattr(convolution, "_LARGE", large)
    monkeypatch.setattr(convolution, "_WIDE", wide)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, height, width, 4)).astype(np.float32)
    kernel = rng.normal(size=(3, 3, 4, 5)).astype(np.float32)
    wanted = by_loops(x, kernel, stride)
    weights = rng.normal(size=wanted.shape).astype(np.float32)
    options = dict(strides=stride, padding=1, use_bias=False)
    ours = nn.Conv(5, (3, 3), conv_general_dilated=convolution.convolve, **options)
    plain = nn.Conv(5, (3, 3), **options)

    def loss(conv, x, kernel):
        return (conv.apply({"params": {"kernel": kernel}}, x) * weights).sum()

    given = jnp.asarray(x), jnp.asarray(kernel)
    found = ours.apply({"params": {"kernel": given[1]}}, given[0])
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
    gradients = (jax.jit(jax.grad(lambda *a, c=c: loss(c, *a), (0, 1))) for c in (ours, plain))
    for one, other in zip(*(gradient(*given) for gradient in gradients), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)
    counted = products_and_convolutions(lambda *a: loss(ours, *a), *given)
    assert counted == forwards
    gradients = jax.value_and_grad(lambda *a: loss(ours, *a), (0, 1))
    assert products_and_convolutions(gradients, *given) == both


@pytest.mark.parametrize("change", [trunk.Downsample, trunk.Upsample])
def test_a_change_of_grid_is_a_product_on_a_cpu(change):
    """In the loop of a training step XLA's own takes up to forty times as long backwards."""
    module = change(Execution())
    x = jnp.ones((1, 4, 4, 8))
    params = module.init(jax.random.key(0), x)
    assert products_and_convolutions(lambda p: module.apply(p, x), params) == (1, 0)
