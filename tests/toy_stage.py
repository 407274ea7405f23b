"""A stage that compiles in a moment: a line fitted to points, with noise on the targets."""

import jax
import jax.numpy as jnp
import numpy as np

from instella_jax.data.loader import make_loader

WIDTH = 4


class Points:
    """Random points x and their y; those of `broken` are not numbers."""

    def __init__(self, length=64, seed=0, broken=()):
        rng = np.random.default_rng(seed)
        self.x = rng.normal(size=(length, WIDTH)).astype(np.float32)
        self.y = (self.x.sum(-1) + rng.normal(size=length)).astype(np.float32)
        self.y[list(broken)] = np.nan

    def __len__(self):
        return len(self.y)

    def __getitem__(self, index):
        return {"x": self.x[index], "y": self.y[index]}

    def __repr__(self):
        return f"Points({len(self)})"


class ToyStage:
    """Least squares; see `instella_jax.stages.base.Stage`."""

    def __init__(self, noise=0.1, source=None, heldout=None):
        self.noise = noise
        self.source = source or Points()
        self.heldout = heldout or Points(11, seed=1)
        self.evaluations_traced = 0

    def init(self, key):
        return {"line": {"w": jax.random.normal(key, (WIDTH,)), "b": jnp.zeros(())}}

    text_folder = None
    critics: dict = {}

    def frozen(self):
        return {}

    def loader(self, split, **options):
        if split == "heldout":
            return make_loader(self.heldout, seed=0, shuffle=False, repeat=False, **options)
        return make_loader(self.source, seed=0, **options)

    def errors(self, params, batch):
        line = params["line"]
        return batch["x"] @ line["w"] + line["b"] - batch["y"]

    def loss(self, params, frozen, batch, key, step):
        noise = self.noise * jax.random.normal(key, batch["y"].shape)
        error = self.errors(params, batch) + noise
        return jnp.mean(jnp.square(error)), {"bias": jnp.mean(error)}

    def evaluate(self, params, frozen, batch, key):
        self.evaluations_traced += 1
        return {"loss": jnp.mean(jnp.square(self.errors(params, batch)))}

    def describe(self):
        return {"tokenizer": {}}
