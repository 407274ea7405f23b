"""Torch files, read and written with torch (the [torch] extra) without unpickling objects."""

import contextlib
import re
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from instella_jax.errors import UserError
from instella_jax.weights.tensor_files import Spec, Tensors, require_file

# Before it, loaders of weights alone were known to be open to attack.
OLDEST = (2, 10)
WEIGHTS = "module"
_CHUNK = 1 << 20


def import_torch() -> Any:
    """Return torch.

    Raises:
      UserError: it is not installed, or too old.
    """
    try:
        import torch
    except ImportError:
        raise UserError("torch files (.pt) need torch: pip install 'instella-jax[torch]'") from None
    numbers = re.match(r"(\d+)\.(\d+)", torch.__version__)
    if numbers is None or (int(numbers[1]), int(numbers[2])) < OLDEST:
        raise UserError(
            f"torch {torch.__version__} is too old to read torch files safely: "
            "pip install 'instella-jax[torch]'"
        )
    return torch


@contextlib.contextmanager
def open_torch(path: Path, key: str | None = WEIGHTS) -> Iterator[Tensors]:
    """Open a torch file that holds its weights under a key.

    The file is mapped, not read; only torch's loader of weights looks at its pickle.

    Args:
      path: of the file.
      key: what they are under, None where the file holds them alone.

    Raises:
      UserError: torch is missing, or the file is, or it is damaged, or holds something else.
    """
    require_file(path)
    size = _check_archive(path)
    torch = import_torch()
    try:
        loaded = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # the loader raises many kinds
        raise UserError(
            f"{path} was refused: it is damaged or holds more than plain tensors ({_reason(error)})"
        ) from None
    weights = loaded.get(key) if isinstance(loaded, dict) and key is not None else loaded
    if not isinstance(weights, dict) or not weights:
        where = "" if key is None else f" under the key {key!r}"
        raise UserError(f"{path} has no weights{where}: expected a mapping there")
    dtypes = {
        torch.float64: np.dtype(np.float64),
        torch.float32: np.dtype(np.float32),
        torch.float16: np.dtype(np.float16),
        torch.bfloat16: np.dtype(jnp.bfloat16),
    }
    specs: dict[str, Spec] = {}
    for name, value in weights.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise UserError(f"{path}: {name!r} is no tensor: expected tensors by name")
        if value.layout != torch.strided or value.dtype not in dtypes:
            raise UserError(f"{path}: tensor {name!r} is {value.dtype}, expected plain floats")
        specs[name] = (tuple(value.shape), dtypes[value.dtype])
    # A tensor can repeat few bytes without end.
    total = sum(value.numel() * value.element_size() for value in weights.values())
    if total > size:
        raise UserError(f"{path} claims tensors of {total} bytes, it has {size}")

    def read(name: str) -> np.ndarray:
        value = weights[name].detach().contiguous()
        if value.dtype == torch.bfloat16:
            return value.view(torch.int16).numpy().view(jnp.bfloat16)
        return value.numpy()

    yield Tensors(specs, read)


def _check_archive(path: Path) -> int:
    """Check the zip archive that a torch file is, and its checksums; return the file's size."""
    size = path.stat().st_size
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
                raise UserError(f"{path} is compressed: expected a file that torch.save wrote")
            if sum(entry.file_size for entry in entries) > size:
                raise UserError(f"{path} claims more data than its {size} bytes")
            for entry in entries:
                if entry.CRC:  # torch can be told to write none
                    with archive.open(entry) as file:
                        while file.read(_CHUNK):
                            pass
    except (zipfile.BadZipFile, OSError, EOFError, ValueError, NotImplementedError,
            RuntimeError) as error:  # fmt: skip
        raise UserError(
            f"{path} is damaged, cut off or not a torch file ({_reason(error)})"
        ) from None
    return size


def _reason(error: Exception) -> str:
    """Return the part of a message that says what was wrong, on one line and printable."""
    text = str(error)
    found = re.search(r"(?:WeightsUnpickler error: |Trying to load |Unsupported ).*", text)
    line = " ".join((found[0] if found else text).split())
    return "".join(c for c in line if c.isprintable())[:200] or type(error).__name__


def write_torch(path: Path, tensors: Iterable[tuple[str, np.ndarray]]) -> None:
    """Write tensors under the key "module".

    Raises:
      UserError: torch is missing.
    """
    torch = import_torch()
    weights = {}
    for name, value in tensors:
        if not value.flags.writeable:
            value = value.copy()
        if value.dtype == jnp.bfloat16:
            weights[name] = torch.from_numpy(value.view(np.int16)).view(torch.bfloat16)
        else:
            weights[name] = torch.from_numpy(value)
    torch.save({WEIGHTS: weights}, path)


def read_state(path: Path) -> dict[str, np.ndarray]:
    """Read a torch file that is a mapping of tensors alone, of any age: {name: float32 array}.

    Only torch's loader of weights looks at its pickle. Counters of whole numbers are left out.

    Raises:
      UserError: torch is missing, or the file is, or it is damaged, or holds something else.
    """
    require_file(path)
    if zipfile.is_zipfile(path):
        _check_archive(path)
    torch = import_torch()
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the loader raises many kinds
        raise UserError(
            f"{path} was refused: it is damaged or holds more than plain tensors ({_reason(error)})"
        ) from None
    values = loaded.values() if isinstance(loaded, dict) else [None]
    if not all(isinstance(value, torch.Tensor) for value in values):
        raise UserError(f"{path} is no mapping of tensors: expected a file of weights")
    floats = {str(k): v for k, v in loaded.items() if v.is_floating_point()}
    return {k: v.detach().to(torch.float32).contiguous().numpy() for k, v in floats.items()}
