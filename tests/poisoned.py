"""A run in which something happens at some steps: python -m tests.poisoned HOW FIRST LAST FLAGS...

HOW is "nan", one value of each batch from FIRST to before LAST is not a number, "spike", all are
too large there, or "idle", what those steps compute is thrown away. FLAGS are those of
`instella_jax.main`, which runs as it is. All compile the same program, so that all else is equal
bit for bit.
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np

from instella_jax import main
from instella_jax.data.watch import DataWatch
from instella_jax.training import loop, step
from instella_jax.training.step import make_step

HOW, FIRST, LAST = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])


class Poisoned(DataWatch):
    """Hands out pictures as floating-point numbers, and says in which steps to be idle."""

    taken = 0

    def peek(self, loader):
        return self.changed(super().peek(loader))

    def take(self, loader):
        batch = self.changed(super().take(loader))
        self.taken += 1
        return batch

    def changed(self, batch):
        image, now = batch["image"].astype(np.float32), FIRST <= self.taken < LAST
        if now and HOW == "nan":
            image[0, -1, 3, 3, 1] = np.nan
        if now and HOW == "spike":
            image *= 1e3
        idle = np.full(image.shape[:2], now and HOW == "idle")
        return {**batch, "image": image, "idle": idle}


def make_idle_step(*arguments):
    """Makes a step that changes nothing where the batch says so."""
    step = make_step(*arguments)

    def either(state, frozen, batches):
        idle = batches.pop("idle").any()
        new, metrics = step(state, frozen, batches)
        parts = [(s.params, s.ema, s.opt_state) for s in (new, state)]
        kept = jax.tree.map(lambda n, o: jnp.where(idle, o, n), *parts)
        return new.replace(**dict(zip(("params", "ema", "opt_state"), kept, strict=True))), metrics

    return either


if __name__ == "__main__":
    loop.DataWatch, step.make_step = Poisoned, make_idle_step
    del sys.argv[1:4]
    main.main()
