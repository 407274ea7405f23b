"""Where the weights to sample with come from."""

import os

from instella_jax.config import Config
from instella_jax.errors import UserError
from instella_jax.models.functional import check_tensor
from instella_jax.runtime import sharding
from instella_jax.sampling.pipeline import InstellaPipeline
from instella_jax.stages import make_stage
from instella_jax.stages.generator import GeneratorStage
from instella_jax.stages.parameters import load_average, load_frozen
from instella_jax.weights import model_folder


def load_pipeline(
    config: Config, workdir: str | os.PathLike[str] | None
) -> tuple[InstellaPipeline, str]:
    """Find the weights: a workdir's checkpoint > `init_from` > the shipped demo weights.

    Returns:
      The pipeline, and a phrase that says where its weights come from.

    Raises:
      UserError: there are no such weights.
    """
    mesh = sharding.make_mesh(config.mesh)
    if workdir is not None:
        stage = make_stage(config)
        if not isinstance(stage, GeneratorStage):
            raise UserError(f"a {config.stage} does not draw prompts; use a t2i config")
        check_tensor({**stage.frozen_networks, **stage.networks}, mesh)
        step, params = load_average(stage, mesh, workdir)
        params = {**load_frozen(stage, mesh), **params}
        pipeline = InstellaPipeline.from_stage(stage, params, mesh)
        return pipeline, f"step {step} of {workdir}"
    folder = model_folder.find_weights(config)
    description = model_folder.read_description(folder)
    tokenizer = (
        None if "tokenizer" in description else model_folder.find(config.tokenizer, "tokenizer")
    )
    encoder = config.text.encoder
    pipeline = InstellaPipeline.from_folder(
        folder,
        tokenizer,
        model_folder.execution(config.run),
        kind=config.stage,
        text_encoder=model_folder.find(encoder, "text.encoder") if encoder else None,
        mesh=mesh,
    )
    return pipeline, str(folder)
