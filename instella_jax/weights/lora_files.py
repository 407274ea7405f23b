"""Adapters in PEFT's files: `adapter_config.json` and `adapter_model.safetensors`.

Layers have the names of the published checkpoints, so that what is trained here on imported weights
fits these weights elsewhere, and the other way round.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from instella_jax.errors import UserError
from instella_jax.models import lora
from instella_jax.models.functional import Network, abstract_params
from instella_jax.models.layers import LORA_A, LORA_B
from instella_jax.models.lora import Adapters
from instella_jax.runtime.files import replacing, write_json
from instella_jax.weights import reference_names
from instella_jax.weights.tensor_files import Tensors, open_safetensors, read_json_file

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
_SIDES = {LORA_A: "lora_A.weight", LORA_B: "lora_B.weight"}
# Settings of PEFT that change what an adapter computes, and the values that are understood here.
_PLAIN = {
    "bias": ("none",),
    "use_dora": (False, None),
    "fan_in_fan_out": (False, None),
    "lora_bias": (False, None),
    "modules_to_save": ((), None),
    "rank_pattern": ((), None),
    "alpha_pattern": ((), None),
    "layer_replication": ((), None),
    "trainable_token_indices": ((), None),
    "target_parameters": ((), None),
}


def _linear_layers(network: Network) -> dict[str, list[str]]:
    """Return the published names of a network's linear layers by their path, one for each block."""
    layers: dict[str, list[str]] = {}
    for entry in reference_names.entries(network):
        if entry.form == "linear":
            path = entry.path.removesuffix("/kernel")
            layers.setdefault(path, []).append(entry.name.removesuffix(".weight"))
    return layers


def _in_any_block(path: str, names: Sequence[str]) -> str:
    """Return the published name of a layer without the block that it is of."""
    return names[0].split(".", 2)[2] if path.startswith("blocks/") else names[0]


def make_adapters(
    network: Network, rank: int, alpha: float, targets: Sequence[str], param_dtype: str
) -> Adapters:
    """Return the adapters of the layers that some names stand for.

    Args:
      network: that is adapted.
      rank: of the adapters.
      alpha: their scale times their rank.
      targets: names of layers, or the ends of names, such as "q_proj" or "attn.q_proj".
      param_dtype: of the adapters.

    Raises:
      UserError: a name stands for no layer, or for that of some blocks only.
    """
    layers, paths = _linear_layers(network), set()
    for target in targets:
        found = {
            path: sum(name == target or name.endswith(f".{target}") for name in names)
            for path, names in layers.items()
        }
        if not any(found.values()):
            ends = sorted(_in_any_block(path, names) for path, names in layers.items())
            raise UserError(
                f"lora.targets has {target!r}, which is no layer: expected names such as "
                f"{', '.join(ends)}, or their ends"
            )
        for path, count in found.items():
            if 0 < count < len(layers[path]):
                raise UserError(
                    f"lora.targets has {target!r}, which is a layer of some blocks only: expected "
                    f"a name of all blocks, such as {_in_any_block(path, layers[path])!r}"
                )
            if count:
                paths.add(path)
    if not paths:
        raise UserError("lora.targets is empty: expected names of layers, such as 'q_proj'")
    kernels = lora.find_kernels(abstract_params(network), sorted(paths))
    return Adapters(kernels, rank, alpha, param_dtype)


def _names(network: Network, path: str) -> Iterator[tuple[int | None, str]]:
    """Yield the block, None where there is one layer only, and the name of a path's layers."""
    for entry in reference_names.entries(network):
        if entry.path == f"{path}/kernel":
            yield entry.layer, PREFIX + entry.name.removesuffix("weight")


def to_tensors(network: Network, params: Any) -> dict[str, np.ndarray]:
    """Name the tensors of adapters as PEFT does: A [R, D] and B [E, R] of each layer."""
    tensors = {}
    arrays: dict[str, Any] = dict(flatten_dict(params, sep="/"))
    for key, value in arrays.items():
        path, side = key.rsplit("/", 1)
        for layer, name in _names(network, path):
            own = np.asarray(value if layer is None else value[layer])
            tensors[name + _SIDES[side]] = np.ascontiguousarray(own.T)
    return tensors


def save(
    folder: str | os.PathLike[str],
    network: Network,
    adapters: Adapters,
    params: Any,
    *,
    base: str,
    step: int,
    dtype: Any = "bfloat16",
) -> None:
    """Write adapters; `adapter_config.json` comes last, so that a cut-off folder is no adapter.

    Args:
      folder: made if it is not there.
      network: that they adapt.
      adapters: what they are.
      params: host arrays, as `adapters.init` makes them.
      base: the model folder that they were trained on.
      step: of their training.
      dtype: type to store in.
    """
    from safetensors.numpy import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {n: a.astype(jnp.dtype(dtype)) for n, a in to_tensors(network, params).items()}
    with replacing(folder / WEIGHTS) as scratch:
        save_file(tensors, scratch, metadata={"format": "pt", "step": str(step)})
        scratch.chmod(0o644)  # safetensors makes private files
    layers = _linear_layers(network)
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base,
        "r": adapters.rank,
        "lora_alpha": adapters.alpha,
        "lora_dropout": 0.0,
        "target_modules": sorted(_in_any_block(path, layers[path]) for path in adapters.kernels),
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
        "init_lora_weights": True,
        "inference_mode": True,
    }
    write_json(folder / CONFIG, config)


def saved_step(folder: str | os.PathLike[str]) -> int | None:
    """Return the step that the adapters of a folder are of, None where there are none."""
    from safetensors import safe_open

    folder = Path(folder)
    if not (folder / CONFIG).exists() or not (folder / WEIGHTS).exists():
        return None
    with safe_open(folder / WEIGHTS, framework="numpy") as file:
        step = (file.metadata() or {}).get("step", "")
    return int(step) if step.isdigit() else None


def load(folder: str | os.PathLike[str], network: Network) -> tuple[Any, float]:
    """Read the adapters of a folder for a network.

    Returns:
      Their parameters, float32 host arrays as `Adapters.init` makes them, and their scale.

    Raises:
      UserError: there are none, they use what is not understood here, or they do not fit.
    """
    folder = Path(folder)
    if not (folder / CONFIG).exists():
        raise UserError(f"no adapters at {folder}: cannot read {folder / CONFIG} (no such file)")
    config = read_json_file(folder / CONFIG)
    rank, scale = _check_config(folder, config)
    with open_safetensors(folder / WEIGHTS) as tensors:
        params = _from_tensors(folder / WEIGHTS, network, tensors, rank)
    return params, scale


def _check_config(folder: Path, config: Mapping[str, Any]) -> tuple[int, float]:
    """Return rank and scale."""
    if config.get("peft_type") != "LORA":
        raise UserError(
            f"{folder / CONFIG} is of the kind {config.get('peft_type')!r}: expected 'LORA'"
        )
    for name, plain in _PLAIN.items():
        value = config.get(name, plain[0])
        if (tuple(value) if isinstance(value, list | dict) else value) not in plain:
            raise UserError(f"{folder / CONFIG} has {name}={value!r}, which is not understood here")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, int | float):
        raise UserError(
            f"{folder / CONFIG} has r={rank!r} and lora_alpha={alpha!r}: expected two numbers"
        )
    return rank, alpha / (rank**0.5 if config.get("use_rslora") else rank)


def _from_tensors(path: Path, network: Network, tensors: Tensors, rank: int) -> Any:
    kernels = {p: k.value.shape for p, k in _kernels(network).items()}
    params, left = {}, set(tensors)
    for layer_path, shape in kernels.items():
        names = [name for _, name in _names(network, layer_path)]
        sides = {LORA_A: (rank, shape[-2]), LORA_B: (shape[-1], rank)}
        if not any(name + end in left for name in names for end in _SIDES.values()):
            continue
        for side, wanted in sides.items():
            pieces = []
            for name in (n + _SIDES[side] for n in names):
                if name not in left:
                    raise UserError(f"{path} lacks the tensor {name!r} of shape {list(wanted)}")
                left.discard(name)
                if tensors.shapes[name] != wanted:
                    raise UserError(
                        f"{path}: tensor {name!r} has shape {list(tensors.shapes[name])}, expected "
                        f"{list(wanted)}: the adapters are of another model"
                    )
                pieces.append(tensors[name].astype(np.float32).T)
            params[f"{layer_path}/{side}"] = np.stack(pieces) if len(shape) == 3 else pieces[0]
    if left:
        raise UserError(
            f"{path} has an unknown tensor {min(left)!r}: the adapters are of another model"
        )
    return unflatten_dict(params, sep="/")


def _kernels(network: Network) -> dict[str, Any]:
    return lora.find_kernels(abstract_params(network), list(_linear_layers(network)))
