"""What a run begins with: sizes that fit each other, parameters and state on the mesh."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax

from instella_jax import model_folder, model_parts, sharding
from instella_jax.config import Config
from instella_jax.errors import UserError
from instella_jax.models.functional import Network, tensor_sizes
from instella_jax.stages import Stage, init_stage, make_stage
from instella_jax.train_state import TrainState, init_state, make_optimizer

Params = Any


def check_sizes(config: Config, mesh: jax.sharding.Mesh) -> None:
    """Checks ranges, and what must divide what.

    Raises:
      UserError: naming the numbers.
    """
    train = config.train
    least = [(train, "train", n, 1) for n in ("batch_size", "accumulate", "steps_per_call")]
    least += [(train, "train", n, 1) for n in ("log_every", "keep", "max_skipped")]
    least += [(train, "train", n, 0) for n in ("steps", "eval_every", "save_every", "image_every")]
    least += [(config.eval, "eval", n, 1) for n in ("batch_size", "batches")]
    for section, of, name, low in least:
        if section[name] < low:
            raise UserError(f"{of}.{name} is {section[name]}: expected at least {low}")
    parts = sharding.batch_parts(mesh) * train.accumulate
    if train.batch_size % parts:
        raise UserError(
            f"train.batch_size={train.batch_size} does not split into {parts} parts "
            f"(data x fsdp devices x train.accumulate): use a multiple of {parts}"
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


def check_tensor(networks: Mapping[str, Network], mesh: jax.sharding.Mesh) -> None:
    """Checks that networks, by part, can be split over the mesh axis `tensor`.

    Raises:
      UserError: naming what does not split, and the sizes of the axis that would do.
    """
    parts = mesh.shape["tensor"]
    found = {
        f"{number} {what} of the {part}": number
        for part, network in networks.items()
        for what, number in tensor_sizes(network).items()
    }
    uneven = [name for name, number in found.items() if number % parts]
    if uneven:
        common = math.gcd(*found.values())
        fitting = [n for n in range(1, common + 1) if common % n == 0]
        raise UserError(
            f"{', '.join(uneven)} do not split into mesh.tensor={parts} parts: use one of {fitting}"
        )


def load_frozen(stage: Stage, mesh: jax.sharding.Mesh) -> Params:
    """Puts the stage's frozen parameters on the mesh."""
    boxed = stage.frozen()
    return jax.device_put(sharding.values(boxed), sharding.tree_shardings(boxed, mesh))


def load_params(stage: Stage, config: Config, mesh: jax.sharding.Mesh) -> Params:
    """Puts the trainable parameters of `init_from`, or else the shipped ones, on the mesh."""
    folder = model_folder.find_weights(config)
    sizes, boxed = stage.describe(), {}
    for part, network in stage.networks.items():
        key = "text.model" if part == "text" else "model"
        name = model_parts.matching_part(folder, part, sizes[part], key)
        boxed[part] = model_folder.load_boxed(folder, name, network, config.run.param_dtype)
    return jax.device_put(sharding.values(boxed), sharding.tree_shardings(boxed, mesh))


def initial_state(stage: Stage, config: Config, mesh: jax.sharding.Mesh) -> tuple[TrainState, Any]:
    """Returns the state before step 0, sharded, and the optimizer."""
    init, optimizer = _initialiser(stage, config)
    return sharding.sharded_init(init, jax.random.key(config.seed), mesh), optimizer


def state_shapes(stage: Stage, config: Config, mesh: jax.sharding.Mesh) -> TrainState:
    """Shapes of that state with their shardings; takes no memory of the devices."""
    init, _ = _initialiser(stage, config)
    return sharding.placed(jax.eval_shape(init, jax.random.key(config.seed)), mesh)


def _initialiser(stage: Stage, config: Config) -> tuple[Callable[[jax.Array], TrainState], Any]:
    optimizer = make_optimizer(config.optimizer, config.train.steps)

    def init(key: jax.Array) -> TrainState:
        init_key, run_key = jax.random.split(key)
        return init_state(init_stage(stage, init_key), optimizer, run_key)

    return init, optimizer
