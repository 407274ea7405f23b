"""Folders of transformers' Dinov2Model on disk: `config.json` and `model.safetensors`.

Nothing is fetched, and nothing that they hold is run.
"""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from instella_jax.errors import UserError
from instella_jax.models.functional import Params, abstract_params
from instella_jax.models.layers import Execution
from instella_jax.models.vision_transformer import VisionConfig, VisionTransformer
from instella_jax.runtime import sharding
from instella_jax.weights.tensor_files import Tensors, open_model, read_json_file

# What a value must be where the network has no choice, and what a config that is silent means.
_FIXED = {"model_type": "dinov2", "hidden_act": "gelu", "num_channels": 3}
# Of training alone.
_UNUSED = ("embeddings.mask_token",)
_LAYER = "encoder.layer.{}."
_IN_LAYER = {
    "norm1/scale": "norm1.weight",
    "norm1/bias": "norm1.bias",
    "norm2/scale": "norm2.weight",
    "norm2/bias": "norm2.bias",
    "scale1": "layer_scale1.lambda1",
    "scale2": "layer_scale2.lambda1",
    **{
        f"{ours}/{leaf}": f"attention.{theirs}.{name}"
        for ours, theirs in (
            ("q", "attention.query"),
            ("k", "attention.key"),
            ("v", "attention.value"),
            ("o", "output.dense"),
        )
        for leaf, name in (("kernel", "weight"), ("bias", "bias"))
    },
}
_OUTSIDE = {
    "class_token": "embeddings.cls_token",
    "positions": "embeddings.position_embeddings",
    "patch_embed/kernel": "embeddings.patch_embeddings.projection.weight",
    "patch_embed/bias": "embeddings.patch_embeddings.projection.bias",
    "norm/scale": "layernorm.weight",
    "norm/bias": "layernorm.bias",
}


def read_sizes(folder: Path) -> VisionConfig:
    """Read the sizes of the network out of a folder's `config.json`.

    Raises:
      UserError: it is missing, or that of another network.
    """
    path = folder / "config.json"
    values = read_json_file(path)
    for name, wanted in _FIXED.items():
        if values.get(name, wanted) != wanted:
            raise UserError(f"{path} has {name}={values[name]!r}: expected {wanted!r}")
    known = {}
    for field in dataclasses.fields(VisionConfig):
        value = values.get(field.name, field.default)
        kinds = (int, float) if field.type is float else (field.type,)
        if type(value) not in kinds or (not isinstance(value, bool) and value <= 0):
            raise UserError(f"{path} has {field.name}={value!r}: expected one positive number")
        known[field.name] = float(value) if field.type is float else value
    config = VisionConfig(**known)
    if config.hidden_size % config.num_attention_heads:
        raise UserError(
            f"{path}: {config.num_attention_heads} heads do not divide hidden_size="
            f"{config.hidden_size}"
        )
    return config


def load_vision(folder: Path, network: VisionTransformer) -> Params:
    """Read the weights of a folder as float32 arrays.

    Raises:
      UserError: a file is missing or damaged, or a tensor is missing, unknown or of another shape.
    """
    like: dict[str, Any] = dict(flatten_dict(sharding.values(abstract_params(network)), sep="/"))
    arrays: dict[str, np.ndarray] = {}
    with open_model(folder) as tensors:
        read = _Reader(folder, tensors)
        for ours, leaf in like.items():
            if not ours.startswith("blocks/"):
                arrays[ours] = read(_OUTSIDE[ours], leaf.shape)
                continue
            inner, layers = ours.removeprefix("blocks/"), []
            for layer in range(network.config.num_hidden_layers):
                prefix = _LAYER.format(layer)
                layers.append(read.inner(prefix, inner, leaf.shape[1:], network.config))
            arrays[ours] = np.stack(layers)
        if unknown := sorted(set(tensors) - read.seen - set(_UNUSED)):
            raise UserError(f"{folder} has the tensor {unknown[0]!r}, which no Dinov2Model has")
    return unflatten_dict(arrays, sep="/")


def make_vision(folder: Path, run: Execution) -> VisionTransformer:
    """Return the network of a folder.

    Raises:
      UserError: see `read_sizes`.
    """
    return VisionTransformer(read_sizes(folder), run)


class _Reader:
    """Reads tensors in our layout, and remembers their names."""

    def __init__(self, folder: Path, tensors: Tensors):
        self.folder, self.tensors = folder, tensors
        self.seen: set[str] = set()

    def _array(self, name: str) -> np.ndarray:
        if name not in self.tensors:
            raise UserError(f"{self.folder} lacks the tensor {name!r}")
        self.seen.add(name)
        value = np.asarray(self.tensors[name], np.float32)
        if value.ndim == 4:  # [D, colours, rows, columns] to [rows * columns * colours, D]
            return value.transpose(2, 3, 1, 0).reshape(-1, len(value))
        return value.T if value.ndim == 2 else value

    def __call__(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        value = self._array(name)
        while value.ndim > len(shape) and value.shape[0] == 1:  # of a batch
            value = value[0]
        if value.shape != tuple(shape):
            raise UserError(
                f"{self.folder}: {name!r} has the shape {list(value.shape)} by our layout, "
                f"expected {list(shape)}"
            )
        return value

    def inner(
        self, prefix: str, ours: str, shape: tuple[int, ...], config: VisionConfig
    ) -> np.ndarray:
        """Return a parameter of a block."""
        if ours in _IN_LAYER:
            return self(prefix + _IN_LAYER[ours], shape)
        part, leaf = ours.split("/")
        end = "weight" if leaf == "kernel" else "bias"
        if not config.use_swiglu_ffn:
            number = {"up": 1, "down": 2}[part]
            return self(f"{prefix}mlp.fc{number}.{end}", shape)
        if part == "down":
            return self(f"{prefix}mlp.weights_out.{end}", shape)
        # One tensor has the gate and then what is gated.
        both = self(f"{prefix}mlp.weights_in.{end}", (*shape[:-1], 2 * shape[-1]))
        return np.split(both, 2, axis=-1)[0 if part == "gate" else 1]
