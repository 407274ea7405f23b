"""Both generators and the text encoder: depth, remat, empty prompts, causality, initial values."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.traverse_util import flatten_dict

from instella_jax.models.ar_transformer import ArTransformer
from instella_jax.models.diffusion_transformer import DiffusionTransformer
from instella_jax.models.layers import REMAT_POLICIES, Execution
from instella_jax.models.olmo import Olmo, OlmoConfig

SIZES = dict(num_layers=2, num_heads=2, head_dim=8, num_tokens=6, bits=5, text_width=12)
# Of jax 0.10; later there are no others. The tests use the old ones, which compile faster.
NEW_FUSIONS = {"xla_cpu_use_fusion_emitters": True} if jax.__version_info__ < (0, 11) else {}
OLMO = OlmoConfig(32, 16, 24, 2, 4, 2, clip_qkv=0.5)


def inputs(kind):
    z = (jax.random.uniform(jax.random.key(1), (3, 6, 5)) < 0.5).astype(jnp.float32)
    text = jax.random.normal(jax.random.key(2), (2, 3, 4, 12))
    mask = jnp.array([[1, 1, 1, 1], [0, 0, 1, 1], [0, 0, 0, 0]])
    if kind is DiffusionTransformer:
        return z, jnp.array([0.0, 0.4, 1.0]), text, mask
    if kind is ArTransformer:
        return z[:, :-1], text, mask
    return jax.random.randint(jax.random.key(3), (3, 4), 0, 32), mask


def build(kind, **run):
    run = Execution(**run)
    return Olmo(OLMO, run) if kind is Olmo else kind(**SIZES, run=run)


@functools.cache
def initial(kind):
    return nn.unbox(jax.jit(build(kind).init)(jax.random.key(0), *inputs(kind)))


@functools.cache
def shaken(kind):
    """Parameters far from the initial values, where zeros hide a part of the network."""
    return jax.tree.map(
        lambda x: x + 0.2 * jax.random.normal(jax.random.key(x.size), x.shape), initial(kind)
    )


def gradients(kind, **run):
    network = build(kind, **run)

    # The fusions that users get, whose order of sums the bounds below are for.
    @functools.partial(jax.jit, compiler_options=NEW_FUSIONS)
    def both(variables):
        def loss(variables):
            out = network.apply(variables, *inputs(kind))
            return jnp.mean(jnp.square(out)), out

        return jax.grad(loss, has_aux=True)(variables)

    return both(shaken(kind))


EACH = pytest.mark.parametrize("kind", [DiffusionTransformer, ArTransformer, Olmo])


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind",
    [DiffusionTransformer, pytest.param(ArTransformer, marks=pytest.mark.thorough), Olmo],
)
def test_depth_and_remat_change_neither_result_nor_gradients(kind):
    grads, out = gradients(kind)
    assert np.isfinite(out).all()
    assert all((np.abs(g).max() > 0) for g in jax.tree.leaves(grads))
    # What is computed again is one wrapper's doing: its ways are tried on one network.
    names = [name for name in REMAT_POLICIES if name != "none"]
    ways = [dict(unroll=True), *(dict(remat=name) for name in names)]
    if kind is not ArTransformer:
        ways = [dict(unroll=True, remat="full")]
    for way in ways:
        other_grads, other = gradients(kind, **way)
        np.testing.assert_allclose(other, out, rtol=1e-5, atol=1e-6)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), other_grads, grads
        )


@EACH
def test_types_are_separate(kind):
    network = build(kind, param_dtype="bfloat16", dtype="bfloat16", output_dtype="float32")
    variables = jax.eval_shape(lambda: nn.unbox(network.init(jax.random.key(0), *inputs(kind))))
    assert {x.dtype for x in jax.tree.leaves(variables)} == {jnp.dtype(jnp.bfloat16)}
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), shaken(kind))
    out = jax.jit(network.apply)(half, *inputs(kind))
    exact = jax.jit(build(kind).apply)(shaken(kind), *inputs(kind))
    assert out.dtype == jnp.float32
    assert np.corrcoef(out.ravel(), np.ravel(exact))[0, 1] > 0.99


@pytest.mark.parametrize("kind", [DiffusionTransformer, ArTransformer])
def test_masked_text_is_not_seen(kind):
    apply, given = jax.jit(build(kind).apply), inputs(kind)
    *rest, text, mask = given
    out = apply(shaken(kind), *given)
    changed = jnp.where(mask[None, :, :, None] > 0, text, 1e3)
    np.testing.assert_allclose(apply(shaken(kind), *rest, changed, mask), out, rtol=1e-5, atol=1e-6)
    assert (apply(shaken(kind), *rest, text + 1, mask) != out)[:2].any((1, 2)).all()


def test_ar_sees_no_later_token():
    apply, (z, text, mask) = jax.jit(build(ArTransformer).apply), inputs(ArTransformer)
    out = apply(shaken(ArTransformer), z, text, mask)
    other = apply(shaken(ArTransformer), z.at[:, 2].set(1 - z[:, 2]), text, mask)
    np.testing.assert_allclose(other[:, :3], out[:, :3], rtol=1e-5, atol=1e-6)
    assert (np.abs(other - out)[:, 3:].max((1, 2)) > 1e-4).all()


def test_initial_values():
    for path, value in flatten_dict(initial(DiffusionTransformer)["params"], sep="/").items():
        if path.endswith("bias") or path.endswith("pos_emb"):
            assert not value.any(), path
        elif path.endswith("kernel"):
            bound = np.sqrt(6 / sum(value.shape[-2:]))
            assert 0.7 * bound < np.abs(value).max() <= bound, path
    for path, value in flatten_dict(initial(ArTransformer)["params"], sep="/").items():
        if path.endswith("pos_emb"):
            assert not value.any()
        elif path.endswith("kernel"):
            bound = value.shape[-2] ** -0.5
            assert 0.7 * bound < np.abs(value).max() <= bound, path


@pytest.mark.parametrize("kind", [DiffusionTransformer, ArTransformer])
def test_position_embeddings_begin_with_the_spread_that_is_asked_for(kind):
    network = kind(**SIZES, pos_emb_std=0.5)
    params = nn.unbox(jax.jit(network.init)(jax.random.key(0), *inputs(kind)))["params"]
    value = params["blocks"]["pos_emb"]
    error = 0.5 / np.sqrt(2 * value.size)
    assert abs(value.std() - 0.5) < 4 * error
    assert abs(value.mean()) < 4 * 0.5 / np.sqrt(value.size)
