"""The parameters of a stage, read onto a mesh."""

import os
from pathlib import Path

import jax
import jax.numpy as jnp

from instella_jax.config import Config
from instella_jax.models.functional import Params
from instella_jax.models.lora import Adapters
from instella_jax.runtime import sharding
from instella_jax.stages.base import Stage, init_stage, without_critics
from instella_jax.stages.generator import GeneratorStage
from instella_jax.weights import lora_files, model_folder, model_parts


def load_average(
    stage: Stage, mesh: jax.sharding.Mesh, workdir: str | os.PathLike[str]
) -> tuple[int, Params]:
    """Read the averaged parameters of a run's newest whole checkpoint, float32 as it keeps them.

    Returns:
      The step, and the parameters by part.

    Raises:
      UserError: the workdir has no whole checkpoint, or one of another model.
    """
    from instella_jax.checkpoints.params import restore_average

    boxed = jax.eval_shape(lambda key: init_stage(stage, key), jax.random.key(0))
    like = jax.tree.map(lambda x: x.update(dtype=jnp.float32), sharding.placed(boxed, mesh))
    return restore_average(workdir, like)


def load_frozen(stage: Stage, mesh: jax.sharding.Mesh) -> Params:
    """Put the stage's frozen parameters on the mesh."""
    boxed = stage.frozen()
    return jax.device_put(sharding.values(boxed), sharding.tree_shardings(boxed, mesh))


def save_trained(stage: Stage, average: Params, step: int, workdir: str | os.PathLike[str]) -> Path:
    """Write averaged parameters as the model folder `model/`, or adapters as `lora/`.

    Args:
      stage: that trained them.
      average: host arrays by part.
      step: of the run.
      workdir: of the run.

    Returns:
      The folder.
    """
    if isinstance(stage, GeneratorStage) and stage.adapters is not None:
        folder, base = Path(workdir) / "lora", str(stage.base_folder)
        network, adapters = stage.network, stage.adapters
        lora_files.save(folder, network, adapters, average["lora"], base=base, step=step)
        return folder
    folder, description = Path(workdir) / "model", {**stage.describe(), "step": step}
    text = stage.text_folder
    model_folder.save(folder, description, average, dtype="bfloat16", text_folder=text)
    return folder


def saved_step(workdir: str | os.PathLike[str]) -> int | None:
    """Return the step that the model folder or the adapters of a run are of, None without any."""
    folder = Path(workdir) / "model"
    if (folder / "config.json").exists():
        return model_folder.read_description(folder).get("step")
    return lora_files.saved_step(Path(workdir) / "lora")


def with_target_of_weights(config: Config) -> Config:
    """Return the config with the `loss.target` of the weights that it names, or the shipped ones.

    Raises:
      UserError: there are none.
    """
    target = model_folder.read_description(model_folder.find_weights(config)).get("target")
    if target is None or "target" not in config.loss:
        return config
    copy = config.copy_and_resolve_references()
    copy.loss.target = target
    return copy


def load_trained(stage: Stage, config: Config, mesh: jax.sharding.Mesh) -> Params:
    """Put the model's parameters of `init_from`, or else the shipped ones, on the mesh.

    Adapters of these change nothing yet.

    Raises:
      UserError: there are none, in other sizes, or of a network that predicts something else.
    """
    folder = model_folder.find_weights(config)
    sizes, boxed = stage.describe(), {}
    model_parts.check_target(folder, sizes)
    for part, network in without_critics(stage, stage.networks).items():
        if isinstance(network, Adapters):
            key = jax.random.key(config.seed)
            return sharding.sharded_init(lambda key: init_stage(stage, key), key, mesh)
        key = "text.model" if part == "text" else "model"
        name = model_parts.matching_part(folder, part, sizes[part], key)
        boxed[part] = model_folder.load_boxed(folder, name, network, config.run.param_dtype)
    return jax.device_put(sharding.values(boxed), sharding.tree_shardings(boxed, mesh))
