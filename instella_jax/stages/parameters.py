"""The parameters of a stage, read onto a mesh."""

import os

import jax
import jax.numpy as jnp

from instella_jax.checkpoints.params import restore_average
from instella_jax.config import Config
from instella_jax.models.functional import Params
from instella_jax.runtime import sharding
from instella_jax.stages.base import Stage, init_stage
from instella_jax.weights import model_folder, model_parts


def load_average(
    stage: Stage, mesh: jax.sharding.Mesh, workdir: str | os.PathLike[str]
) -> tuple[int, Params]:
    """Read the averaged parameters of a run's newest whole checkpoint, float32 as it keeps them.

    Returns:
      The step, and the parameters by part.

    Raises:
      UserError: the workdir has no whole checkpoint, or one of another model.
    """
    boxed = jax.eval_shape(lambda key: init_stage(stage, key), jax.random.key(0))
    like = jax.tree.map(lambda x: x.update(dtype=jnp.float32), sharding.placed(boxed, mesh))
    return restore_average(workdir, like)


def load_frozen(stage: Stage, mesh: jax.sharding.Mesh) -> Params:
    """Put the stage's frozen parameters on the mesh."""
    boxed = stage.frozen()
    return jax.device_put(sharding.values(boxed), sharding.tree_shardings(boxed, mesh))


def load_trained(stage: Stage, config: Config, mesh: jax.sharding.Mesh) -> Params:
    """Put the trainable parameters of `init_from`, or else the shipped ones, on the mesh."""
    folder = model_folder.find_weights(config)
    sizes, boxed = stage.describe(), {}
    for part, network in stage.networks.items():
        key = "text.model" if part == "text" else "model"
        name = model_parts.matching_part(folder, part, sizes[part], key)
        boxed[part] = model_folder.load_boxed(folder, name, network, config.run.param_dtype)
    return jax.device_put(sharding.values(boxed), sharding.tree_shardings(boxed, mesh))
