"""Held-out metrics of a stage."""

import contextlib
import functools
from collections.abc import Callable

import jax
import numpy as np

from instella_jax.config import Config
from instella_jax.errors import UserError
from instella_jax.models.functional import Params
from instella_jax.runtime import sharding
from instella_jax.stages.base import Stage


@functools.lru_cache(maxsize=2)
def evaluator(stage: Stage) -> Callable[..., dict[str, jax.Array]]:
    """Compile a stage's evaluation, once per stage."""
    return jax.jit(stage.evaluate)


def evaluate(stage: Stage, params: Params, frozen: Params, config: Config, mesh) -> dict:
    """Return means of the stage's held-out metrics over at most `eval.batches` batches.

    Where the held-out data end before, the last batch may be short; each row counts alike.
    """
    function = evaluator(stage)
    loader = stage.loader("heldout", batch_size=config.eval.batch_size)
    totals: list[dict[str, jax.Array]] = []
    counts: list[int] = []
    with contextlib.closing(loader):
        for index, batch in zip(range(config.eval.batches), loader, strict=False):
            rows = sharding.arrays(batch)
            counts.append(len(next(iter(rows.values()))))
            key = jax.random.fold_in(jax.random.key(config.seed), index)
            totals.append(function(params, frozen, sharding.place_copy(rows, mesh), key))
    if not totals:
        raise UserError("there are no held-out data to evaluate on")
    fetched = jax.device_get(totals)
    return {
        name: float(np.average([t[name] for t in fetched], weights=counts)) for name in fetched[0]
    }
