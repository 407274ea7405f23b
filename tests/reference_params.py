"""Parameters of a network made of a reference state dict that is held in memory."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from instella_jax.models.functional import Network
from instella_jax.weights import convert


def to_params(
    network: Network, tensors: Mapping[str, np.ndarray], what: str = "checkpoint"
) -> dict[str, Any]:
    """Return nested parameters in the tensors' own types, layers stacked.

    Args:
      network: what the parameters are for.
      tensors: reference tensors by name; `copies` and `unused_shapes` may be there or not.
      what: the file's name, for messages.

    Raises:
      UserError: see `convert.account` and `convert.stream`.
    """
    convert.account(network, {name: np.shape(value) for name, value in tensors.items()}, what)
    pieces: dict[str, list[np.ndarray]] = {}
    stacked = {}
    for entry, piece in convert.stream(network, tensors, what):
        pieces.setdefault(entry.path, []).append(piece)
        stacked[entry.path] = entry.layer is not None
    return convert.nested(
        {path: np.stack(parts) if stacked[path] else parts[0] for path, parts in pieces.items()}
    )
