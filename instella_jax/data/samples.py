"""What a data source is, and what it says of a sample that cannot be used."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

Sample = dict[str, Any]


Transform = Callable[[Sample, np.random.Generator], Sample]


class BadSample(Exception):
    """Raised by a source or a transform for a sample that cannot be used; the loader skips it."""


class Source(Protocol):
    """Random access to samples: pure in the index."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Sample:
        """Return the sample at `index`, in [0, len)."""
        ...
