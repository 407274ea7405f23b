"""DINOv2 against transformers' torch, and folders that are refused."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from instella_jax.errors import UserError
from instella_jax.models.functional import apply
from instella_jax.models.layers import Execution
from instella_jax.models.vision_transformer import DEVIATION, MEAN, bicubic
from instella_jax.weights.vision_folder import load_vision, make_vision, read_sizes
from tests import vision_folders
from tests.needs_torch import needs_torch


def features(folder, images, **run):
    network = make_vision(folder, Execution(**run))
    return apply(network, load_vision(folder, network), jnp.asarray(images))


@needs_torch
@pytest.mark.parametrize(
    ("size", "gated", "unroll"),
    [((56, 56), False, True), ((84, 70), False, False), ((28, 14), True, False)],
)
def test_features_are_those_of_transformers(tmp_path, size, gated, unroll):
    import torch
    from transformers import Dinov2Model

    vision_folders.write(tmp_path, use_swiglu_ffn=gated)
    theirs, told = Dinov2Model.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(told[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    images = np.random.default_rng(1).uniform(-1, 1, (2, *size, 3)).astype(np.float32)
    pixels = ((images + 1) / 2 - MEAN) / DEVIATION
    with torch.no_grad():
        found = theirs.eval()(
            torch.tensor(pixels.transpose(0, 3, 1, 2), dtype=torch.float32),
            output_hidden_states=True,
        )
    last, states = features(tmp_path, images, unroll=unroll)
    wanted = found.last_hidden_state.numpy()
    np.testing.assert_allclose(last, wanted, rtol=1e-4, atol=2e-5)
    assert np.abs(wanted[:, 1:] - wanted[:, :1]).mean() > 0.2  # positions differ
    for ours, hidden in zip(states, found.hidden_states[1:], strict=True):
        np.testing.assert_allclose(ours, hidden.numpy(), rtol=1e-4, atol=5e-5)


@needs_torch
@pytest.mark.parametrize(("source", "target"), [(4, 7), (16, 5), (3, 3), (37, 16), (2, 9)])
def test_axes_are_resized_as_torch_does(source, target):
    import torch

    x = torch.eye(source)[None, :, :, None].expand(1, source, source, 5)
    wanted = torch.nn.functional.interpolate(x, (target, 5), mode="bicubic")[0, :, :, 2]
    np.testing.assert_allclose(bicubic(source, target), wanted.numpy().T, atol=1e-6)


def test_half_precision_on_disk_is_read_as_float32(tmp_path):
    made = vision_folders.write(tmp_path)
    half = {name: value.astype(np.float16) for name, value in made.items()}
    save_file(half, tmp_path / "model.safetensors")
    params = load_vision(tmp_path, make_vision(tmp_path, Execution()))
    name = "encoder.layer.1.attention.attention.key.weight"
    kernel = params["blocks"]["k"]["kernel"][1]
    assert kernel.dtype == np.float32
    np.testing.assert_array_equal(kernel.T, half[name].astype(np.float32))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_type": "dinov2_with_registers"}, "model_type='dinov2_with_registers': expected"),
        ({"hidden_act": "relu"}, "hidden_act='relu': expected 'gelu'"),
        ({"patch_size": [14, 14]}, r"patch_size=\[14, 14\]: expected one positive number"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0: expected one positive number"),
        ({"num_attention_heads": 5}, "5 heads do not divide hidden_size=24"),
    ],
)
def test_other_networks_are_refused(tmp_path, values, message):
    vision_folders.write(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    with pytest.raises(UserError, match=message):
        read_sizes(tmp_path)


def test_weights_that_do_not_fit_are_refused_by_name(tmp_path):
    made = vision_folders.write(tmp_path)
    network = make_vision(tmp_path, Execution())

    def refused(tensors, message):
        save_file(tensors, tmp_path / "model.safetensors")
        with pytest.raises(UserError, match=message):
            load_vision(tmp_path, network)

    name = "encoder.layer.2.norm1.bias"
    refused({k: v for k, v in made.items() if k != name}, f"lacks the tensor '{name}'")
    refused({**made, name: made[name][:7]}, r"norm1.bias' has the shape \[7\]")
    refused({**made, "head.weight": made[name]}, "'head.weight', which no Dinov2Model has")
    (tmp_path / "model.safetensors").write_bytes(b"x" * 20)
    with pytest.raises(UserError, match="damaged"):
        load_vision(tmp_path, network)
