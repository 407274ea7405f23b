"""Held-out metrics of a stage."""

import contextlib
import functools
from collections.abc import Callable

import jax
import numpy as np
from clu.metrics import Average

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
    means = [
        {name: mean_of_rows(value, count) for name, value in values.items()}
        for values, count in zip(jax.device_get(totals), counts, strict=True)
    ]
    return {
        name: float(functools.reduce(Average.merge, (mean[name] for mean in means)).compute())
        for name in means[0]
    }


def mean_of_rows(mean: np.ndarray, rows: int) -> Average:
    """Return the mean of a batch in a form that merges with other batches, rows weighted equally.

    Args:
      mean: over the batch; a batch lies on all devices and processes, so that it is theirs too.
      rows: of the batch.
    """
    # In float64: merged in float32, many batches would round.
    return Average(total=np.float64(mean) * rows, count=np.int64(rows))  # pyright: ignore
