"""The published checkpoints' tensors <-> this project's parameters.

Every tensor is accounted for, in both directions; `reference_names` says which is which.
"""

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from instella_jax.errors import UserError
from instella_jax.models.functional import Network, abstract_params
from instella_jax.runtime import sharding
from instella_jax.weights.reference_names import FORMS, Entry, copies, entries, unused_shapes

Tensors = Mapping[str, np.ndarray]


def shapes_by_path(network: Network) -> dict[str, jax.ShapeDtypeStruct]:
    """Return shapes of a network's parameters by path, "encoder/out/kernel"; nothing is
    allocated."""
    return _shapes(network)  # pyright: ignore[reportArgumentType] (linen modules can be hashed)


@functools.cache
def _shapes(network: Network) -> dict[str, jax.ShapeDtypeStruct]:
    return _flat(sharding.values(abstract_params(network)))


def _flat(params: Mapping[str, Any]) -> dict[str, Any]:
    paths: Any = flatten_dict(dict(params), sep="/")
    return paths


def nested(params: Mapping[str, Any]) -> dict[str, Any]:
    """Nest parameters that are named by their paths."""
    return unflatten_dict(dict(params), sep="/")


def reference_shapes(network: Network) -> dict[str, tuple[int, ...]]:
    """Return shapes of the reference tensors by name."""
    ours = shapes_by_path(network)
    shapes = {}
    for entry in entries(network):
        shape = ours[entry.path].shape[entry.layer is not None :]
        # A broadcast scalar has the shape and takes no memory.
        shapes[entry.name] = FORMS[entry.form][1](np.broadcast_to(np.int8(0), shape)).shape
    return shapes


def account(network: Network, shapes: Mapping[str, tuple[int, ...]], what: str) -> None:
    """Check the names and shapes of a reference state dict.

    Args:
      network: what it is for.
      shapes: shapes by name. `copies` and `unused_shapes` may be there or not.
      what: the file's name, for messages.

    Raises:
      UserError: a tensor is missing, unknown or of the wrong shape; the message names it.
    """
    wanted = reference_shapes(network)
    optional = _optional_shapes(network, wanted)
    if missing := [name for name in wanted if name not in shapes]:
        raise UserError(f"{what}: {_listed(missing)} missing; {_HINT}")
    if unknown := [name for name in shapes if name not in wanted and name not in optional]:
        raise UserError(f"{what}: {_listed(unknown)} unknown; {_HINT}")
    for name, shape in {**wanted, **optional}.items():
        if name in shapes and tuple(shapes[name]) != shape:
            raise UserError(
                f"{what}: tensor {name!r} has shape {tuple(shapes[name])}, expected {shape}; "
                f"{_HINT}"
            )


def by_path(network: Network) -> dict[str, list[Entry]]:
    """Group `entries` by our parameter, the layers of each in order."""
    groups: dict[str, list[Entry]] = {}
    for entry in entries(network):
        groups.setdefault(entry.path, []).append(entry)
    return groups


def stream(
    network: Network, tensors: Tensors, what: str = "checkpoint"
) -> Iterator[tuple[Entry, np.ndarray]]:
    """Turn a reference state dict into pieces of parameters, one after the other.

    A mapping that loads on demand needs memory for one tensor at a time.

    Args:
      network: what the parameters are for.
      tensors: reference tensors by name; `account` has checked their names and shapes.
      what: the file's name, for messages.

    Yields:
      (entry, piece): the parameters as `by_path` orders them, each layer by layer.

    Raises:
      UserError: a tensor is not of floats, not finite, of another type than in other blocks, or
        no copy of what it should be a copy of; the message names it.
    """
    for group in by_path(network).values():
        dtype = None
        for entry in group:
            value = _checked(tensors, entry.name, what)
            dtype = dtype or value.dtype
            if value.dtype != dtype:
                raise UserError(
                    f"{what}: tensor {entry.name!r} is {value.dtype}, in other blocks {dtype}; "
                    "expected the same type in every block"
                )
            yield entry, FORMS[entry.form][0](value)
    for name in unused_shapes(network):
        if name in tensors:
            _checked(tensors, name, what)
    for name, original in copies(network).items():
        if name in tensors and not _same(_checked(tensors, name, what), tensors[original]):
            raise UserError(
                f"{what}: tensor {name!r} differs from {original!r}; expected a copy of it"
            )


_HINT = "check that the file is complete and that the sizes given are those of this model"


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    plural = "tensors" if len(names) > 1 else "tensor"
    return f"{plural} {', '.join(map(repr, names[:3]))}{more}"


def _optional_shapes(
    network: Network, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[int, ...]]:
    repeated = {name: shapes[original] for name, original in copies(network).items()}
    return {**unused_shapes(network), **repeated}


def _checked(tensors: Tensors, name: str, what: str) -> np.ndarray:
    value = np.asarray(tensors[name])
    if not jnp.issubdtype(value.dtype, jnp.floating):
        raise UserError(f"{what}: tensor {name!r} is {value.dtype}, expected floats")
    if not np.isfinite(value).all():
        raise UserError(f"{what}: tensor {name!r} holds NaN or infinite values")
    return value


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    """Return whether two arrays of one shape have the same bits."""
    raw = f"u{a.dtype.itemsize}"
    return a.dtype == b.dtype and np.array_equal(a.view(raw), b.view(raw))


def from_params(
    network: Network, params: Mapping[str, Any], unused: Tensors | None = None
) -> Iterator[tuple[str, np.ndarray]]:
    """Turn parameters back into reference tensors, one at a time.

    Args:
      network: what the parameters are for.
      params: nested parameters, anything with a shape that can be indexed and made an array.
      unused: the tensors of `unused_shapes` that came with the checkpoint; zeros where not given.

    Yields:
      (name, tensor) for everything that the reference expects, copies and unused included.

    Raises:
      UserError: a parameter is missing, unknown, or of the wrong shape; the message names it.
    """
    ours = {path: leaf.shape for path, leaf in shapes_by_path(network).items()}
    given = _flat(params)
    for path in ours.keys() | given.keys():
        if path not in given or path not in ours or given[path].shape != ours[path]:
            found = given[path].shape if path in given else "nothing"
            raise UserError(
                f"parameter {path!r}: found {found}, expected {ours.get(path, 'nothing')}"
            )
    repeated = {original: name for name, original in copies(network).items()}
    dtype = np.dtype(jnp.float32)
    for entry in entries(network):
        stored = given[entry.path]
        value = np.asarray(stored if entry.layer is None else stored[entry.layer])
        value = np.ascontiguousarray(FORMS[entry.form][1](value))
        dtype = value.dtype
        yield entry.name, value
        if entry.name in repeated:
            yield repeated[entry.name], value
    for name, shape in unused_shapes(network).items():
        yield name, (unused or {}).get(name, np.zeros(shape, dtype))
