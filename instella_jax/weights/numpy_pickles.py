"""Pickles that hold nothing but numpy arrays, read so that nothing in them is ever run."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
from numpy._core import multiarray

from instella_jax.errors import UserError
from instella_jax.weights.tensor_files import require_file

# All that a pickle of plain arrays names, by module and name; numpy 1 called its module core.
_ALLOWED = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("numpy.core.multiarray", "_reconstruct"): multiarray._reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): multiarray._reconstruct,
}


class _ArraysOnly(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """Return one of the few names that arrays need."""
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return _ALLOWED[module, name]


def read_numpy_pickle(path: Path) -> dict[str, Any]:
    """Read a pickle of nested dictionaries of float arrays.

    Returns:
      The arrays by their paths, with slashes between the names.

    Raises:
      UserError: the file is missing or damaged, or holds anything else.
    """
    require_file(path)
    try:
        with path.open("rb") as file:
            tree = _ArraysOnly(file).load()
    except Exception as error:  # a damaged pickle raises whatever its bytes lead to
        raise UserError(
            f"{path} was refused: it is damaged or holds more than numpy arrays "
            f"({str(error) or type(error).__name__})"
        ) from None
    return dict(_flat(tree, "", path))


def _flat(tree: Any, prefix: str, path: Path) -> Any:
    if isinstance(tree, dict):
        for name, value in tree.items():
            yield from _flat(value, f"{prefix}/{name}" if prefix else str(name), path)
    elif isinstance(tree, np.ndarray) and tree.dtype.kind == "f":
        yield prefix, tree
    else:
        raise UserError(f"{path}: {prefix or 'the whole'} is no array of floats")
