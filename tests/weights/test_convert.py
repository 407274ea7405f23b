import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from instella_jax.errors import UserError
from instella_jax.models.ar_transformer import ArTransformer
from instella_jax.models.diffusion_transformer import DiffusionTransformer
from instella_jax.models.olmo import Olmo
from instella_jax.models.tokenizer import TokenizerNetwork
from instella_jax.weights import convert, reference_sizes
from tests.paths import ROOT
from tests.reference_params import to_params

VECTORS = ROOT / "tests/data/parity"
META = json.loads((VECTORS / "meta.json").read_text())
GENERATOR = reference_sizes.generator_sizes(META["generator"], META["bae"])
NETWORKS = {
    "tokenizer": TokenizerNetwork(reference_sizes.tokenizer_sizes(META["bae"])),
    "diffusion": DiffusionTransformer(**GENERATOR),
    "ar": ArTransformer(**GENERATOR),
    "olmo": Olmo(reference_sizes.olmo_config(META["text"])),
}
EACH = pytest.mark.parametrize("name", NETWORKS)


def weights(name):
    return {
        key.removeprefix("weights."): value
        for key, value in load_file(VECTORS / f"{name}.safetensors").items()
        if key.startswith("weights.")
    }


@EACH
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_there_and_back_is_identical(name, dtype):
    tensors = {key: value.astype(dtype) for key, value in weights(name).items()}
    network = NETWORKS[name]
    params = to_params(network, tensors)
    unused = {key: tensors[key] for key in convert.unused_shapes(network)}
    back = dict(convert.from_params(network, params, unused))
    assert back.keys() == tensors.keys()
    for key, value in tensors.items():
        assert back[key].dtype == value.dtype and back[key].shape == value.shape
        assert back[key].tobytes() == value.tobytes(), key


@EACH
def test_parameters_are_those_of_the_network(name):
    network = NETWORKS[name]
    params = to_params(network, weights(name))
    shapes = {k: v.shape for k, v in convert.shapes_by_path(network).items()}
    found = {
        "/".join(str(key.key) for key in path): leaf.shape
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    assert found == shapes


def test_optional_tensors_may_be_missing():
    tensors = weights("olmo")
    del tensors["lm_head.weight"]
    back = dict(convert.from_params(NETWORKS["olmo"], to_params(NETWORKS["olmo"], tensors)))
    np.testing.assert_array_equal(back["lm_head.weight"], tensors["model.embed_tokens.weight"])
    tensors = {k: v.astype(jnp.bfloat16) for k, v in weights("ar").items() if "time_embed" not in k}
    back = dict(convert.from_params(NETWORKS["ar"], to_params(NETWORKS["ar"], tensors)))
    assert {v.dtype for v in back.values()} == {np.dtype(jnp.bfloat16)}
    assert {k: v.shape for k, v in back.items()} == {k: v.shape for k, v in weights("ar").items()}


def damaged(name, tensor, change):
    tensors = weights(name)
    value = change(tensors.pop(tensor))
    return tensors if value is None else {**tensors, tensor: value}


BLOCK = "transformer_blocks.1.attn.q_proj.weight"


@pytest.mark.parametrize(
    ("name", "tensor", "change", "message"),
    [
        ("diffusion", BLOCK, lambda x: None, "missing"),
        ("diffusion", BLOCK, lambda x: x[:-1], r"shape \(31, 32\), expected \(32, 32\)"),
        ("diffusion", BLOCK, lambda x: np.where(x == x.max(), np.nan, x), "NaN"),
        ("diffusion", BLOCK, lambda x: np.where(x == x.max(), np.inf, x), "infinite"),
        ("diffusion", BLOCK, lambda x: x.astype(np.float16), "float16"),
        ("diffusion", BLOCK, lambda x: x.astype(np.int32), "int32"),
        ("ar", "time_embed.linear_1.bias", lambda x: x[:-1], "shape"),
        ("ar", "time_embed.linear_1.bias", lambda x: x * np.nan, "NaN"),
        ("olmo", "lm_head.weight", lambda x: x + 1, "copy"),
        ("olmo", "lm_head.weight", lambda x: np.nextafter(x, np.float32(np.inf)), "copy"),
        ("tokenizer", "encoder.mask", lambda x: x, "unknown"),
    ],
)
def test_damage_is_named(name, tensor, change, message):
    if tensor in weights(name):
        tensors = damaged(name, tensor, change)
    else:
        tensors = {**weights(name), tensor: np.zeros(3, np.float32)}
    with pytest.raises(UserError, match=message) as error:
        to_params(NETWORKS[name], tensors, "some.pt")
    assert tensor in str(error.value) and "some.pt" in str(error.value)


def test_export_names_what_does_not_fit():
    params = to_params(NETWORKS["diffusion"], weights("diffusion"))
    short = jax.tree.map(lambda x: x[:-1], params["bits_in"])
    for change in ({"bits_in": {}}, {"more": np.zeros(3)}, {"bits_in": short}):
        with pytest.raises(UserError, match="bits_in|more"):
            list(convert.from_params(NETWORKS["diffusion"], {**params, **change}))


def test_sizes_of_a_language_model():
    text = {**META["text"], "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}
    assert reference_sizes.olmo_config(text).rope_theta == 5e5
    with pytest.raises(UserError, match="heads"):
        reference_sizes.olmo_config({**META["text"], "num_attention_heads": 5})
