"""Files of tensors by name: safetensors, whole or in shards, and torch files.

A file is opened without reading its data, and nothing that it holds is ever run. Each tensor is
read when it is asked for, so that memory stays near the size of one.
"""

import contextlib
import dataclasses
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from instella_jax.errors import UserError

# Floats by their name in a safetensors file.
FLOATS = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(jnp.bfloat16),
}
Spec = tuple[tuple[int, ...], np.dtype]
MAX_JSON_BYTES = 64_000_000


@dataclasses.dataclass(frozen=True)
class Tensors(Mapping[str, np.ndarray]):
    """Tensors by name, read when asked for.

    Attributes:
      specs: shape and type of each.
      read: reads one.
      slice_of: gives something to index a tensor by, where that spares reading all of it.
    """

    specs: Mapping[str, Spec]
    read: Callable[[str], np.ndarray]
    slice_of: Callable[[str], Any] | None = None

    def read_layer(self, name: str, layer: int) -> np.ndarray:
        """Read one entry along the first axis of a tensor."""
        return np.asarray((self.slice_of or self.read)(name)[layer])

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self.specs:
            raise KeyError(name)
        return self.read(name)

    def __contains__(self, name: object) -> bool:
        """Tell whether there is such a tensor, without reading it."""
        return name in self.specs

    def __iter__(self) -> Iterator[str]:
        return iter(self.specs)

    def __len__(self) -> int:
        return len(self.specs)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes by name."""
        return {name: shape for name, (shape, _) in self.specs.items()}


def read_json_file(path: Path) -> dict[str, Any]:
    """Read a file that holds one JSON object.

    Raises:
      UserError: it cannot be read, or is none.
    """
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise UserError(f"{path} has more than {MAX_JSON_BYTES} bytes: expected a small file")
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error})") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} holds a JSON {type(values).__name__}, expected an object")
    return values


@contextlib.contextmanager
def open_safetensors(path: Path) -> Iterator[Tensors]:
    """Open a safetensors file.

    Raises:
      UserError: the file is missing, damaged, or holds a tensor that is not of floats.
    """
    from safetensors import SafetensorError, safe_open

    require_file(path)
    try:
        file = safe_open(path, framework="numpy")
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path} is damaged or no safetensors file ({error})") from None
    with file:
        specs: dict[str, Spec] = {}
        for name in file.keys():  # noqa: SIM118 (no mapping)
            part = file.get_slice(name)
            dtype = FLOATS.get(part.get_dtype())
            if dtype is None:
                raise UserError(f"{path}: tensor {name!r} is {part.get_dtype()}, expected floats")
            specs[name] = (tuple(part.get_shape()), dtype)
        yield Tensors(specs, file.get_tensor, file.get_slice)


@contextlib.contextmanager
def open_model(folder: Path) -> Iterator[Tensors]:
    """Open a language model's folder: `model.safetensors`, or shards and their index.

    Raises:
      UserError: files are missing or damaged, or do not hold what the index says.
    """
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").exists() or not index.exists():
        with open_safetensors(folder / "model.safetensors") as tensors:
            yield tensors
        return
    weight_map = read_json_file(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index} has no weight_map of tensors: expected the index of shards")
    shards = sorted({str(shard) for shard in weight_map.values()})
    # An index must not lead out of its folder.
    for shard in shards:
        if Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise UserError(f"{index} names the shard {shard!r}: expected a .safetensors file name")
    with contextlib.ExitStack() as stack:
        opened = {s: stack.enter_context(open_safetensors(folder / s)) for s in shards}
        owners = {name: shard for shard, tensors in opened.items() for name in tensors}
        for name in weight_map.keys() | owners.keys():
            if weight_map.get(name) != owners.get(name):
                raise UserError(
                    f"{index} puts tensor {name!r} into {weight_map.get(name)}, it is in "
                    f"{owners.get(name)}; check that all shards are of one model"
                )
        yield Tensors(
            {name: opened[shard].specs[name] for name, shard in owners.items()},
            lambda name: opened[owners[name]][name],
        )


def require_file(path: Path) -> None:
    """Check that there is such a file and that it can be read.

    Raises:
      UserError: naming it.
    """
    if not path.is_file():
        raise UserError(f"{path} is missing: expected a file")
    if not os.access(path, os.R_OK):
        raise UserError(f"{path} cannot be read: check its permissions")


def write_safetensors(
    path: Path, specs: Mapping[str, Spec], pieces: Iterable[tuple[str, np.ndarray]]
) -> None:
    """Write a safetensors file as its data come.

    Args:
      path: of the file.
      specs: shape and type of each tensor.
      pieces: (name, part of that tensor), the parts of a tensor in order and together.
    """
    by_name = {dtype: name for name, dtype in FLOATS.items()}
    header: dict[str, Any] = {}
    end = 0
    # Wide types first: each tensor then starts at a multiple of its own size.
    for name in sorted(specs, key=lambda n: (-specs[n][1].itemsize, n)):
        shape, dtype = specs[name]
        start, end = end, end + int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        header[name] = {
            "dtype": by_name[dtype],
            "shape": list(shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    written = dict.fromkeys(specs, 0)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for name, piece in pieces:
            file.seek(8 + len(text) + header[name]["data_offsets"][0] + written[name])
            # Not every type has a buffer of its own.
            file.write(np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data)
            written[name] += piece.nbytes
        file.truncate(8 + len(text) + end)
    for name, count in written.items():
        start, end = header[name]["data_offsets"]
        if count != end - start:
            raise ValueError(f"tensor {name!r} got {count} bytes of {end - start}")
