"""Counters of the samples in a training step.

Axes: G steps per call, B batch.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from instella_jax.config import Config
from instella_jax.data import buckets
from instella_jax.data.sources import part_names

Counter = Callable[[dict[str, jax.Array], jax.Array], dict[str, jax.Array]]


def make_counter(config: Config) -> Counter:
    """Return `count(batches, ready)` for the batches [G, B, ...] of a config.

    It gives sums over all steps and processes by name: "skipped_samples", which the loaders left
    out for these batches; "samples_<name>" from each of several sources;
    "samples_<height>x<width>" of each of several shapes. `ready` is True; what is summed over
    devices waits for it.
    """
    shapes = buckets.shapes(config)

    def count(batches: dict[str, jax.Array], ready: jax.Array) -> dict[str, jax.Array]:
        def total(rows: jax.Array) -> jax.Array:
            return jnp.sum(jnp.where(ready, rows, 0))

        counts: dict[str, Any] = {}
        if "skipped_before" in batches:
            counts["skipped_samples"] = total(batches["skipped_before"])
        if "source" in batches:
            for number, name in enumerate(part_names(config.data)):
                counts[f"samples_{name}"] = total(batches["source"] == number)
        if "image" in batches and len(shapes) > 1:
            *leading, height, width, _ = batches["image"].shape
            for shape in shapes:
                here = math.prod(leading) if shape == (height, width) else 0
                counts["samples_{}x{}".format(*shape)] = jnp.int32(here)
        return counts

    return count
