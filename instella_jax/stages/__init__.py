"""What is trained: each stage joins networks, losses and data for the one training loop."""

from typing import Any, Protocol

import jax
import numpy as np

from instella_jax.config import Config
from instella_jax.errors import UserError
from instella_jax.models.functional import Network, init_params

Params = Any
Batch = dict[str, jax.Array]


class Stage(Protocol):
    """What the training loop needs to know of a stage; all functions are pure."""

    @property
    def networks(self) -> dict[str, Network]:
        """The networks that are trained, by the name of their part in params."""
        ...

    @property
    def frozen_networks(self) -> dict[str, Network]:
        """The networks that the loss reads and nobody trains, by part; {} without."""
        ...

    def frozen(self) -> Params:
        """Parameters, with logical axes, of the frozen networks; {} without."""
        ...

    def loader(self, split: str, **options: Any) -> Any:
        """Batches of the split "train" or "heldout"; options as in `data.loader.make_loader`."""
        ...

    def loss(
        self, params: Params, frozen: Params, batch: Batch, key: jax.Array, step: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Loss and metrics of a batch, each a mean."""
        ...

    def evaluate(
        self, params: Params, frozen: Params, batch: Batch, key: jax.Array
    ) -> dict[str, jax.Array]:
        """Held-out metrics of a batch, each a mean; the same key gives the same draws."""
        ...

    def pictures(
        self, params: Params, frozen: Params, count: int
    ) -> tuple[list[np.ndarray], list[str]]:
        """Pictures, uint8 [h, w, 3], and captions that show where training stands."""
        ...

    def describe(self) -> dict[str, Any]:
        """The `config.json` of a model folder with this stage's networks."""
        ...


def init_stage(stage: Stage, key: jax.Array) -> Params:
    """Makes the trainable parameters of a stage by part, with their logical axes."""
    return {
        part: init_params(network, jax.random.fold_in(key, number))
        for number, (part, network) in enumerate(sorted(stage.networks.items()))
    }


def make_stage(config: Config) -> Stage:
    """Builds the stage that `config.stage` names.

    Raises:
      UserError: there is no such stage.
    """
    if config.stage == "tokenizer":
        from instella_jax.stages.tokenizer import TokenizerStage

        return TokenizerStage(config)
    if config.stage == "diffusion":
        from instella_jax.stages.diffusion import DiffusionStage

        return DiffusionStage(config)
    if config.stage == "ar":
        from instella_jax.stages.autoregressive import AutoregressiveStage

        return AutoregressiveStage(config)
    raise UserError(f"stage is {config.stage!r}: expected 'tokenizer', 'diffusion' or 'ar'")
