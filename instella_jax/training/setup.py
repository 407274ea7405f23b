"""What a run begins with: sizes that fit each other, parameters and state on the mesh."""

from collections.abc import Callable
from typing import Any

import jax

from instella_jax.config import Config
from instella_jax.config_keys import check_values
from instella_jax.errors import UserError
from instella_jax.models.functional import check_tensor
from instella_jax.runtime import sharding
from instella_jax.stages import make_stage
from instella_jax.stages.base import Stage, init_stage
from instella_jax.training.optimizer import make_optimizer
from instella_jax.training.step import TrainState, init_state


def check_sizes(config: Config, mesh: jax.sharding.Mesh) -> None:
    """Check every value of a config, and what must divide what.

    Raises:
      UserError: naming the numbers.
    """
    check_values(config)
    train = config.train
    if train.keep_best and not (train.eval_every and train.save_every):
        raise UserError(
            f"train.keep_best={train.keep_best!r} needs checkpoints that are evaluated: give "
            "train.eval_every and train.save_every, the first of which divides the second"
        )
    parts = sharding.batch_parts(mesh) * train.accumulate
    if train.batch_size % parts:
        raise UserError(
            f"train.batch_size={train.batch_size} does not split into {parts} parts "
            f"(dcn_data x data x fsdp devices x train.accumulate): use a multiple of {parts}"
        )
    if sharding.batch_parts(mesh) % jax.process_count():
        raise UserError(
            f"mesh data={mesh.shape['data']}, fsdp={mesh.shape['fsdp']} does not split the batch "
            f"over {jax.process_count()} processes: mesh.tensor must not span several of them"
        )
    every = ("steps", "log_every", "eval_every", "save_every", "image_every")
    for name in every:
        if train[name] % train.steps_per_call:
            raise UserError(
                f"train.{name}={train[name]} is not a multiple of "
                f"train.steps_per_call={train.steps_per_call}"
            )
    if mesh.shape["tensor"] > 1:
        stage = make_stage(config)
        check_tensor({**stage.frozen_networks, **stage.networks}, mesh)


def initial_state(stage: Stage, config: Config, mesh: jax.sharding.Mesh) -> tuple[TrainState, Any]:
    """Return the state before step 0, sharded, and the optimizer."""
    init, optimizer = _initialiser(stage, config)
    return sharding.sharded_init(init, jax.random.key(config.seed), mesh), optimizer


def state_shapes(stage: Stage, config: Config, mesh: jax.sharding.Mesh) -> TrainState:
    """Return shapes of that state with their shardings; this takes no memory of the devices."""
    init, _ = _initialiser(stage, config)
    return sharding.placed(jax.eval_shape(init, jax.random.key(config.seed)), mesh)


def _initialiser(stage: Stage, config: Config) -> tuple[Callable[[jax.Array], TrainState], Any]:
    optimizer = make_optimizer(config.optimizer, config.train.steps, stage.critics)

    def init(key: jax.Array) -> TrainState:
        init_key, run_key = jax.random.split(key)
        return init_state(init_stage(stage, init_key), optimizer, run_key)

    return init, optimizer
