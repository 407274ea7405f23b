"""`--mode=eval`: held-out figures of a stage, from a workdir or from a model folder."""

import os

from instella_jax import model_folder, sharding
from instella_jax.config import Config
from instella_jax.draw import restore
from instella_jax.stages import make_stage
from instella_jax.train import evaluate, load_frozen, load_params


def evaluate_config(config: Config, workdir: str | os.PathLike[str] | None) -> dict:
    """Prints and returns the held-out metrics of a stage.

    Args:
      config: of the stage.
      workdir: of a training run; None for `init_from` or the shipped weights.

    Raises:
      UserError: there are no such weights, or the data cannot be read.
    """
    mesh = sharding.make_mesh(config.mesh)
    with sharding.use(mesh):
        if workdir is not None:
            step, params, frozen = restore(config, workdir)
            source = f"step {step} of {workdir}"
        else:
            stage = make_stage(config)
            params, frozen = load_params(stage, config, mesh), load_frozen(stage, mesh)
            source = str(model_folder.find_weights(config))
        metrics = evaluate(make_stage(config), params, frozen, config, mesh)
    print(f"held out, with {source}:")
    for name, value in metrics.items():
        print(f"  {name.replace('_', ' ')} {value:.4f}")
    return metrics
