"""Norms against formulas in float64, in float32 and in half precision."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from instella_jax.models.layers import Execution, layer_norm, rms_norm

# Far from the origin, so that a mean or a square in half precision would be wrong.
X = 5.0 + 3.0 * np.random.default_rng(0).normal(size=(4, 7, 96))
SCALE = np.random.default_rng(1).uniform(0.5, 2.0, 96)
G = np.random.default_rng(2).normal(size=X.shape)


def written_out(x, scale, centred):
    """Result and gradients of its sum times G, of x and of the scale."""
    mean = x.mean(-1, keepdims=True) if centred else 0.0
    root = 1 / np.sqrt(np.square(x - mean).mean(-1, keepdims=True) + 1e-6)
    normal, g = (x - mean) * root, G * scale
    of_x = g - normal * (g * normal).mean(-1, keepdims=True)
    of_x -= g.mean(-1, keepdims=True) if centred else 0.0
    return normal * scale, root * of_x, (G * normal).sum((0, 1))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("centred", [False, True])
def test_norms_and_their_gradients(centred, dtype):
    exact = jnp.asarray(X, dtype)
    scale = np.ones(96) if centred else np.asarray(SCALE, np.float32)
    norm = rms_norm(Execution(dtype=dtype))

    def loss(x, scale):
        if centred:
            out = layer_norm(x)
        else:
            out = norm.apply({"params": {"scale": scale}}, x)
        return jnp.sum(G * out.astype(jnp.float32)), out

    grad = jax.jit(jax.grad(loss, (0, 1), has_aux=True))
    (of_x, of_scale), out = grad(exact, jnp.asarray(scale, jnp.float32))
    assert out.dtype == of_x.dtype == exact.dtype
    wanted = written_out(np.asarray(exact, np.float64), scale, centred)
    # Numbers are rounded to so many digits once, sums are not; what arrives is rounded before.
    digits = {"float32": 1e-6, "bfloat16": 2**-8, "float16": 2**-11}[dtype]
    np.testing.assert_allclose(np.asarray(out, np.float64), wanted[0], rtol=digits, atol=1e-6)
    size = np.abs(wanted[1]).max()
    tolerance = {"float32": 1e-5, "bfloat16": 1e-2, "float16": 2e-3}[dtype] * size
    np.testing.assert_allclose(np.asarray(of_x, np.float64), wanted[1], rtol=0, atol=tolerance)
    if not centred:
        np.testing.assert_allclose(of_scale, wanted[2], rtol=0.02, atol=0.02)


def test_half_precision_has_the_parameter_of_float32():
    trees = [
        jax.eval_shape(rms_norm(Execution(dtype=dtype)).init, jax.random.key(0), jnp.zeros((2, 8)))
        for dtype in ("float32", "bfloat16")
    ]
    assert jax.tree.structure(trees[0]) == jax.tree.structure(trees[1])
