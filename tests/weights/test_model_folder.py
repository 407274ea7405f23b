"""Model folders: what is written, what is read again, and what is refused in a sentence."""

import dataclasses
import json
import shutil
import stat

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from safetensors.numpy import load_file, save_file

from instella_jax.errors import UserError
from instella_jax.models.tokenizer import TokenizerNetwork
from instella_jax.runtime import sharding
from instella_jax.weights import model_folder

WEIGHTS = "tokenizer.safetensors"


@pytest.fixture(scope="module")
def sizes(tiny_tokenizer_folder):
    return model_folder.read_description(tiny_tokenizer_folder)["tokenizer"]


@pytest.fixture(scope="module")
def network(sizes):
    return TokenizerNetwork(model_folder.tokenizer_config(sizes))


@pytest.fixture
def folder(tiny_tokenizer_folder, tmp_path):
    """A copy to damage."""
    return shutil.copytree(tiny_tokenizer_folder, tmp_path / "model")


def test_sizes_that_are_unknown_or_missing_are_named(sizes):
    with pytest.raises(UserError, match=r"tokenizer has unknown sizes \['colour'\]: expected"):
        model_folder.tokenizer_config({**sizes, "colour": 3})
    with pytest.raises(UserError, match=r"text lacks the sizes \['a'\]"):
        model_folder.build(dataclasses.make_dataclass("Sizes", [("a", int)]), {}, "text")
    assert model_folder.tokenizer_config({**sizes, "rope_axes": [4, 2, 2]}).rope_axes == (4, 2, 2)


def test_a_code_of_as_many_bits_in_other_tokens_is_another_code(folder, sizes):
    tokens, bits = sizes["num_tokens"], sizes["bits"]
    assert model_folder.code_sizes(str(folder), tokens, bits).bits == bits
    with pytest.raises(UserError, match=f"makes {tokens} tokens of {bits} bits, the generator exp"):
        model_folder.code_sizes(str(folder), tokens * 2, bits // 2)


def test_what_is_saved_can_be_read_by_others_and_brings_its_text_tokenizer(tmp_path):
    text = model_folder.ASSETS / "demo_text"
    params = {"a": {"b": np.ones((2, 3), np.float32)}}
    out = tmp_path / "out"
    description = {"tokenizer": {}, "step": 3}
    model_folder.save(out, description, {"tokenizer": params}, dtype=jnp.bfloat16, text_folder=text)
    assert stat.S_IMODE((out / WEIGHTS).stat().st_mode) == 0o644
    assert load_file(out / WEIGHTS)["a/b"].dtype == jnp.bfloat16
    assert (out / "tokenizer.json").read_bytes() == (text / "tokenizer.json").read_bytes()
    assert json.loads((out / "config.json").read_text()) == description


def test_parameters_are_held_in_the_type_and_place_that_is_asked_for(folder, network):
    stored = load_file(folder / WEIGHTS)
    mesh = sharding.make_mesh({"data": 1, "fsdp": 8, "tensor": 1})
    params = model_folder.load(folder, "tokenizer", network, "bfloat16", mesh)
    boxed = model_folder.load_boxed(folder, "tokenizer", network, "bfloat16")
    names = [leaf.names for leaf in jax.tree.leaves(boxed, is_leaf=is_box) if is_box(leaf)]
    assert "embed" in {name for axes in names for name in axes}
    for name, value in model_folder.flatten(sharding.values(boxed)).items():
        assert value.dtype == jnp.bfloat16
        np.testing.assert_array_equal(value, stored[name].astype(jnp.bfloat16))
    leaves = jax.tree.leaves(params)
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype(jnp.bfloat16)}
    assert any(leaf.addressable_shards[0].data.shape != leaf.shape for leaf in leaves)


def is_box(leaf):
    return isinstance(leaf, nn.Partitioned)


def test_tensors_that_do_not_fit_are_named(folder, network):
    stored = load_file(folder / WEIGHTS)
    name = next(name for name, value in sorted(stored.items()) if value.ndim > 1)
    value = stored[name]
    without = {key: tensor for key, tensor in stored.items() if key != name}
    for tensors, sentence in (
        ({**stored, name: np.ascontiguousarray(value[:, :-1])}, f"{name}' has shape"),
        ({**stored, "more": value}, "has an unknown tensor 'more'"),
        (without, f"lacks the tensor '{name}'"),
    ):
        save_file(tensors, folder / WEIGHTS)
        with pytest.raises(UserError, match=sentence):
            model_folder.load(folder, "tokenizer", network, "float32")


def test_a_file_of_weights_comes_before_a_folder_of_them(folder):
    (folder / "tokenizer").mkdir()
    assert model_folder.weights_path(folder, "tokenizer") == folder / WEIGHTS
    (folder / WEIGHTS).unlink()
    assert model_folder.weights_path(folder, "tokenizer") == folder / "tokenizer"


def test_json_that_describes_no_part_is_no_model(tmp_path):
    (tmp_path / "config.json").write_text('{"hidden_size": 3}')
    with pytest.raises(UserError, match="is not the config of a model: expected one of the keys"):
        model_folder.read_description(tmp_path)


def test_arrays_that_are_strided_in_memory_are_written_in_order(tmp_path):
    table = np.arange(12, dtype=np.float32).reshape(3, 4)
    model_folder.save(
        tmp_path, {}, {"tokenizer": {"turned": table.T, "every_second": table[:, ::2]}}
    )
    read = load_file(tmp_path / WEIGHTS)
    np.testing.assert_array_equal(read["turned"], [[0, 4, 8], [1, 5, 9], [2, 6, 10], [3, 7, 11]])
    np.testing.assert_array_equal(read["every_second"], [[0, 2], [4, 6], [8, 10]])
