"""What networks keep for the backward pass, in widths of bfloat16 a token and layer."""

import jax
import jax.numpy as jnp
import pytest

from instella_jax.models.ar_transformer import ArTransformer
from instella_jax.models.diffusion_transformer import DiffusionTransformer
from instella_jax.models.functional import abstract_params, apply
from instella_jax.models.layers import Execution
from instella_jax.models.tokenizer import TokenizerNetwork
from instella_jax.models.tokenizer_config import TokenizerConfig
from instella_jax.runtime import sharding

LAYERS, TOKENS, HEADS, DIM = 8, 64, 2, 32
WIDTH = HEADS * DIM
GENERATOR = dict(
    num_layers=LAYERS, num_heads=HEADS, head_dim=DIM, num_tokens=TOKENS, bits=4, text_width=WIDTH
)
TOKENIZER = TokenizerConfig(
    num_tokens=TOKENS // 2, bits=4, encoder_layers=LAYERS, encoder_heads=HEADS,
    encoder_head_dim=DIM, decoder_layers=1, decoder_heads=1, decoder_head_dim=DIM,
    rope_axes=(8, 12, 12), patch_size=4, downsample_after=(), upsample_after=(),
)  # fmt: skip


def kept(kind, batch, dtype=None, **run):
    """Bytes that the backward pass reads, parameters included; of a type alone, or of all."""
    execution = Execution(dtype="bfloat16", **run)
    is_tokenizer = kind is TokenizerNetwork
    network = kind(TOKENIZER, execution) if is_tokenizer else kind(**GENERATOR, run=execution)
    code = jax.ShapeDtypeStruct((batch, TOKENS, 4), jnp.float32)
    text = jax.ShapeDtypeStruct((LAYERS, batch, TOKENS, WIDTH), jnp.bfloat16)
    mask = jax.ShapeDtypeStruct((batch, TOKENS), jnp.bool_)
    times = jax.ShapeDtypeStruct((batch,), jnp.float32)
    # As many patches as latent tokens.
    pictures = jax.ShapeDtypeStruct((batch, 16, 4 * TOKENS // 8, 3), jnp.float32)
    inputs = {
        TokenizerNetwork: (pictures,),
        DiffusionTransformer: (code, times, text, mask),
        ArTransformer: (code.update(shape=(batch, TOKENS - 1, 4)), text, mask),
    }[kind]
    method = "encode" if is_tokenizer else None

    def backward(params, *inputs):
        return jax.vjp(lambda params: apply(network, params, *inputs, method=method), params)[1]

    shapes = jax.eval_shape(backward, sharding.values(abstract_params(network)), *inputs)
    leaves = [x for x in jax.tree.leaves(shapes) if dtype in (None, x.dtype)]
    return sum(x.size * x.dtype.itemsize for x in leaves)


def widths(kind, **run):
    """Of one more row, which leaves parameters and tables out."""
    return (kept(kind, 2, **run) - kept(kind, 1, **run)) / (2 * TOKENS * WIDTH * LAYERS)


@pytest.mark.parametrize("attention", ["xla", "blocks"])
@pytest.mark.parametrize("kind", [DiffusionTransformer, ArTransformer, TokenizerNetwork])
def test_without_recomputed_products_few_widths_are_kept(kind, attention):
    # The text has as many tokens as the image and counts to it.
    assert 10 < widths(kind, remat="dots", attention=attention) <= 20
    assert widths(kind, remat="full", attention=attention) < 5
    assert widths(kind, remat="none", attention=attention) > 30


@pytest.mark.parametrize("kind", [DiffusionTransformer, ArTransformer, TokenizerNetwork])
def test_nothing_wide_is_kept_in_float32(kind):
    # Two numbers of statistics for each norm of a row or of a head: a tenth of a width here. Sums
    # of attention are float32, and computed again by this engine.
    assert widths(kind, dtype=jnp.float32, remat="none", attention="blocks") < 0.5
    assert widths(kind, dtype=jnp.float32, remat="dots", attention="blocks") < 0.1


@pytest.mark.parametrize("kind", [DiffusionTransformer, TokenizerNetwork])
def test_no_product_with_weights_is_computed_again(kind):
    def products(remat):
        execution = Execution(dtype="bfloat16", remat=remat, unroll=True, attention="xla")
        small = dict(GENERATOR, num_layers=2)
        network = (
            TokenizerNetwork(TOKENIZER, execution)
            if kind is TokenizerNetwork
            else kind(**small, run=execution)
        )
        params = sharding.values(abstract_params(network))
        if kind is TokenizerNetwork:
            inputs = (jnp.zeros((1, 16, 16, 3)),)
        else:
            text = jnp.zeros((2, 1, TOKENS, WIDTH))
            inputs = jnp.zeros((1, TOKENS, 4)), jnp.zeros(1), text, jnp.ones((1, TOKENS))

        def loss(params):
            return apply(network, params, *inputs).astype(jnp.float32).sum()

        text = str(jax.make_jaxpr(jax.grad(loss))(params))
        # Those of attention have batch dimensions.
        return text.count("dot_general[dimension_numbers=(([1], [0]), ([], []))")

    assert products("dots") == products("none") < products("full")
