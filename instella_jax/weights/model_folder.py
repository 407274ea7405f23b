"""Model folders: what is shipped, imported, exported and trained on top of.

A folder holds `config.json` (sizes of each part), the weights of each part and, where there is a
text encoder, `tokenizer.json` and the settings beside it. Parts are "tokenizer", "text" and
generators: one "generator" where it was trained here, "diffusion" and "ar" where both may be there;
their sizes name their `kind`. Weights are in `<part>.safetensors`, or in the orbax checkpoint
`<part>/`.
"""

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from instella_jax.errors import UserError
from instella_jax.models import attention
from instella_jax.models.functional import Network, abstract_params
from instella_jax.models.layers import Execution
from instella_jax.models.text import tokenizer_files
from instella_jax.models.tokenizer_config import TokenizerConfig
from instella_jax.runtime import sharding
from instella_jax.runtime.files import replacing, write_bytes, write_json
from instella_jax.weights.tensor_files import Tensors, open_safetensors, read_json_file

ASSETS = Path(__file__).parents[1] / "assets"
PARTS = ("tokenizer", "generator", "diffusion", "ar", "text")


# Platforms of `attention.platform` that an engine of attention runs on alone, in words.
NEEDS = {"cudnn": "cuda", "flash": "tpu"}
PLATFORMS = {"cuda": "an NVIDIA GPU of the Ampere generation or later", "tpu": "a TPU"}


def execution(config: Mapping[str, Any]) -> Execution:
    """Read a config's `run` section.

    Raises:
      UserError: a value does not go with another one or with the device.
    """
    half = [key for key in ("param_dtype", "dtype") if config[key] == "float16"]
    if half and jax.default_backend() == "cpu":
        raise UserError(
            f"run.{half[0]} is 'float16', in which jax does not compute on a CPU: use 'bfloat16' "
            "or 'float32'"
        )
    if config["attention"] == "cudnn" and config["dtype"] == "float32":
        raise UserError(
            "run.attention=cudnn does not compute in float32: give --config.run.dtype=bfloat16 "
            "too, or leave run.attention at auto"
        )
    needed, where = NEEDS.get(config["attention"], ""), attention.platform()
    if needed and needed != where:
        raise UserError(
            f"run.attention={config['attention']} needs {PLATFORMS[needed]}, and this is "
            f"{jax.devices()[0].device_kind}: leave it at auto, which takes what there is"
        )
    values = {k: v for k, v in config.items() if k != "cpu_devices"}
    return Execution(**{**values, "attention": values["attention"] or "auto"})


def build(kind: type, values: Mapping[str, Any], what: str) -> Any:
    """Make a dataclass of sizes out of JSON or config values, lists becoming tuples.

    Raises:
      UserError: a name is missing or unknown.
    """
    names = {field.name for field in dataclasses.fields(kind)}
    required = {f.name for f in dataclasses.fields(kind) if f.default is dataclasses.MISSING}
    if unknown := sorted(set(values) - names):
        raise UserError(f"{what} has unknown sizes {unknown}: expected {sorted(names)}")
    if missing := sorted(required - set(values)):
        raise UserError(f"{what} lacks the sizes {missing}")
    plain = {k: tuple(v) if isinstance(v, list) else v for k, v in dict(values).items()}
    return kind(**plain)


def tokenizer_config(values: Mapping[str, Any]) -> TokenizerConfig:
    """Read the sizes of a tokenizer."""
    return build(TokenizerConfig, values, "tokenizer")


def code_sizes(folder: str, num_tokens: int, bits: int) -> TokenizerConfig:
    """Read the sizes of the tokenizer that a generator's codes come from.

    Args:
      folder: config key `tokenizer`; "" is the published tokenizer, of which only shapes are known.
      num_tokens: N of the generator.
      bits: K of the generator.

    Raises:
      UserError: the folder is no model folder, or its code has another shape.
    """
    if not folder:
        return TokenizerConfig(num_tokens=num_tokens, bits=bits)
    found = find(folder, "tokenizer")
    sizes = tokenizer_config(read_description(found).get("tokenizer", {}))
    if (sizes.num_tokens, sizes.bits) != (num_tokens, bits):
        raise UserError(
            f"tokenizer {found} makes {sizes.num_tokens} tokens of {sizes.bits} bits, "
            f"the generator expects {num_tokens} of {bits}"
        )
    return sizes


def flatten(params: Any) -> dict[str, np.ndarray]:
    """Name each leaf by its path, "encoder/trunk/...": host arrays."""
    return {k: np.asarray(v) for k, v in flatten_dict(jax.device_get(params), sep="/").items()}


def save(
    folder: str | os.PathLike[str],
    description: Mapping[str, Any],
    parts: Mapping[str, Any],
    *,
    dtype: Any = None,
    text_folder: Path | None = None,
) -> None:
    """Write a model folder; `config.json` comes last, so that a cut-off folder is no model.

    Args:
      folder: made if it is not there.
      description: sizes of the parts, written to `config.json`.
      parts: parameters by the name of the part.
      dtype: type to store in, None for the parameters' own.
      text_folder: of a text tokenizer to take along.
    """
    from safetensors.numpy import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for part, params in parts.items():
        arrays = {
            name: np.ascontiguousarray(a if dtype is None else a.astype(dtype))
            for name, a in flatten(params).items()
        }
        with replacing(folder / f"{part}.safetensors") as scratch:
            save_file(arrays, scratch)
            scratch.chmod(0o644)  # safetensors makes private files
    if text_folder is not None:
        for name, content in tokenizer_files(text_folder).items():
            write_bytes(folder / name, content)
    write_json(folder / "config.json", dict(description))


def find(value: str, key: str) -> Path:
    """Return the model folder that a config key names; "demo" is the shipped one.

    Raises:
      UserError: the key is empty.
    """
    if not value:
        raise UserError(f"config.{key} names no model folder: give --config.{key}=FOLDER")
    return ASSETS / f"demo_{key.split('.')[0]}" if value == "demo" else Path(value)


def find_weights(config: Any) -> Path:
    """Return the model folder to use without a workdir: `init_from`, or else the shipped one.

    Raises:
      UserError: there is none of these.
    """
    if config.init_from:
        return Path(config.init_from)
    if config.shipped:
        return ASSETS / config.shipped
    raise UserError(
        "no weights to use: give --workdir=RUN of a training run or "
        "--config.init_from=FOLDER of a model"
    )


def read_description(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Read `config.json` of a model folder.

    Raises:
      UserError: the folder is not a model folder.
    """
    path = Path(folder) / "config.json"
    if not path.exists():
        raise UserError(f"no model at {folder}: cannot read {path} (no such file)")
    description = read_json_file(path)
    if not set(description) & set(PARTS):
        raise UserError(f"{path} is not the config of a model: expected one of the keys {PARTS}")
    return description


def has_weights(folder: str | os.PathLike[str], part: str) -> bool:
    """Tell whether a model folder holds the weights of a part."""
    return weights_path(folder, part).exists()


def weights_path(folder: str | os.PathLike[str], part: str) -> Path:
    """Return the file, or the folder, that holds the weights of a part in a model folder."""
    file = Path(folder) / f"{part}.safetensors"
    return file if file.is_file() else Path(folder) / part


def unused_file(folder: Path, part: str) -> Path:
    """Return the file with a part's published tensors that its network does not use."""
    return folder / f"{part}_unused.safetensors"


@contextlib.contextmanager
def open_part(folder: str | os.PathLike[str], part: str, network: Network) -> Iterator[Tensors]:
    """Open the parameters of a part, by their paths and in the type they were stored in.

    Args:
      folder: a model folder.
      part: one of `PARTS`.
      network: the network they are for.

    Raises:
      UserError: the file is missing, damaged, or does not fit.
    """
    path = Path(folder) / f"{part}.safetensors"
    if not has_weights(folder, part):
        raise UserError(f"model folder {folder} has no {part}: {path.name} is missing")
    with contextlib.ExitStack() as stack:
        if path.is_file():
            tensors = stack.enter_context(open_safetensors(path))
        else:
            from instella_jax.checkpoints.params import load_params

            path = Path(folder) / part
            arrays = flatten(load_params(path))
            specs = {name: (a.shape, a.dtype) for name, a in arrays.items()}
            tensors = Tensors(specs, arrays.__getitem__)
        _check(path, tensors.shapes, sharding.values(abstract_params(network)))
        yield tensors


def load_boxed(folder: str | os.PathLike[str], part: str, network: Network, dtype: str) -> Any:
    """Read the parameters of a part with the logical axes that the network gives them.

    Args:
      folder: a model folder.
      part: one of `PARTS`.
      network: the network they are for.
      dtype: type to hold them in.

    Raises:
      UserError: see `open_part`.
    """
    with open_part(folder, part, network) as tensors:
        values = {name: value.astype(dtype, copy=False) for name, value in tensors.items()}
    return with_axes(network, unflatten_dict(values, sep="/"))


def with_axes(network: Network, params: Any) -> Any:
    """Box parameters with the logical axes that the network gives them."""

    def box(like: Any, value: np.ndarray) -> Any:
        return like.replace_boxed(value) if isinstance(like, nn.Partitioned) else value

    return jax.tree.map(
        box,
        abstract_params(network),
        params,
        is_leaf=lambda x: isinstance(x, nn.Partitioned),
    )


def load(
    folder: str | os.PathLike[str],
    part: str,
    network: Network,
    dtype: str,
    mesh: jax.sharding.Mesh | None = None,
) -> Any:
    """Read the parameters of a part as plain device arrays, one after the other.

    Args:
      folder: a model folder.
      part: one of `PARTS`.
      network: the network they are for.
      dtype: type to hold them in.
      mesh: where they go, sharded by their logical axes; None is the default device.

    Raises:
      UserError: see `open_part`.
    """
    places: dict[str, Any] = {}
    if mesh is not None:
        shardings = sharding.tree_shardings(abstract_params(network), mesh)
        places = dict(flatten_dict(shardings, sep="/"))
    with open_part(folder, part, network) as tensors:
        values = {
            name: jax.device_put(value.astype(dtype, copy=False), places.get(name))
            for name, value in tensors.items()
        }
    return unflatten_dict(values, sep="/")


def _check(path: Path, shapes: Mapping[str, tuple], like: Any) -> None:
    leaves: dict[str, Any] = dict(flatten_dict(like, sep="/"))
    wanted = {k: tuple(v.shape) for k, v in leaves.items()}
    for name in sorted(set(wanted) | set(shapes)):
        if name not in shapes:
            raise UserError(f"{path} lacks the tensor {name!r} of shape {list(wanted[name])}")
        if name not in wanted:
            raise UserError(f"{path} has an unknown tensor {name!r}")
        if tuple(shapes[name]) != wanted[name]:
            raise UserError(
                f"{path}: tensor {name!r} has shape {list(shapes[name])}, "
                f"expected {list(wanted[name])}"
            )
