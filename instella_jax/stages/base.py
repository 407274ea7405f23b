"""What the training loop needs to know of a stage."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import jax
import optax
from jaxtyping import Array, Float, Int, Key

from instella_jax.models.functional import Network, Params, Trainable, init_params

Batch = dict[str, jax.Array]
Metrics = dict[str, Float[Array, ""]]


class Stage(Protocol):
    """What the training loop needs to know of a stage; all functions are pure."""

    @property
    def networks(self) -> Mapping[str, Trainable]:
        """The networks or adapters that are trained, by the name of their part in params."""
        ...

    @property
    def critics(self) -> dict[str, optax.GradientTransformation]:
        """Those of the networks that are trained beside the model and are no part of it, as a
        discriminator is, each with its own optimizer, by part; {} without.

        `loss` counts what only they pay as 0, with its gradient: one gradient then serves all, in
        which no network sees another's parameters but through what the loss lets through.
        """
        ...

    @property
    def frozen_networks(self) -> dict[str, Network]:
        """The networks that the loss reads and nobody trains, by part; {} without."""
        ...

    @property
    def text_folder(self) -> Path | None:
        """Folder of the text tokenizer that a model folder of this stage takes along, if any."""
        ...

    def frozen(self) -> Params:
        """Return parameters, with logical axes, of the frozen networks; {} without."""
        ...

    def loader(self, split: str, **options: Any) -> Any:
        """Return batches of the split "train" or "heldout"; options as in
        `data.loader.make_loader`."""
        ...

    def loss(
        self,
        params: Params,
        frozen: Params,
        batch: Batch,
        key: Key[Array, ""],
        step: Int[Array, ""],
    ) -> tuple[Float[Array, ""], Metrics]:
        """Return the loss and metrics of a batch, each a mean."""
        ...

    def evaluate(
        self, params: Params, frozen: Params, batch: Batch, key: Key[Array, ""]
    ) -> Metrics:
        """Return held-out metrics of a batch, each a mean; the same key gives the same numbers."""
        ...

    def describe(self) -> dict[str, Any]:
        """Return the `config.json` of a model folder with this stage's networks."""
        ...


def init_stage(stage: Stage, key: Key[Array, ""]) -> Params:
    """Make the trainable parameters of a stage by part, with their logical axes."""
    return {
        part: init_params(network, jax.random.fold_in(key, number))
        for number, (part, network) in enumerate(sorted(stage.networks.items()))
    }


def without_critics(stage: Stage, params: Params) -> Params:
    """Return the parameters of the model alone."""
    return {part: values for part, values in params.items() if part not in stage.critics}
