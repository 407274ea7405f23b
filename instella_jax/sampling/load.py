"""Where the weights to sample with come from."""

import dataclasses
import os
from pathlib import Path
from typing import Any

from instella_jax.config import Config
from instella_jax.errors import UserError
from instella_jax.models.functional import check_tensor
from instella_jax.runtime import sharding
from instella_jax.runtime.digest import digest
from instella_jax.sampling.pipeline import InstellaPipeline
from instella_jax.stages import make_stage
from instella_jax.stages.generator import GeneratorStage
from instella_jax.stages.parameters import load_average, load_frozen
from instella_jax.weights import model_folder, model_parts


@dataclasses.dataclass(frozen=True)
class Weights:
    """Which weights a pipeline samples with.

    Attributes:
      folder: the model folder, or the workdir of a run.
      step: of the run's checkpoint, None for a model folder.
      digests: by the part that the weights are of; "checkpoint" is a run's, by its manifest.
    """

    folder: str
    step: int | None
    digests: dict[str, str]

    def __str__(self) -> str:
        """Say it in words."""
        return self.folder if self.step is None else f"step {self.step} of {self.folder}"

    def record(self) -> dict[str, Any]:
        """Return it as JSON has it."""
        return {k: v for k, v in dataclasses.asdict(self).items() if v is not None}


def _of_run(workdir: Path, step: int, stage: GeneratorStage) -> Weights:
    """Return which weights a checkpoint, and the stage's frozen parts, have."""
    manifest = workdir / "checkpoints" / str(step) / "manifest.json"
    paths = {
        "checkpoint": manifest,
        "tokenizer": model_folder.weights_path(stage.tokenizer_folder, "tokenizer"),
    }
    if not stage.config.text.trainable:
        paths["text"] = model_folder.weights_path(stage.text_folder, "text")
    found = {name: digest(path) for name, path in paths.items() if path.exists()}
    return Weights(str(workdir), step, found)


def load_pipeline(
    config: Config, workdir: str | os.PathLike[str] | None
) -> tuple[InstellaPipeline, Weights]:
    """Find the weights: a workdir's checkpoint > `init_from` > the shipped demo weights.

    Returns:
      The pipeline, and which weights it has.

    Raises:
      UserError: there are no such weights.
    """
    mesh = sharding.make_mesh(config.mesh)
    if workdir is not None:
        stage = make_stage(config)
        if not isinstance(stage, GeneratorStage):
            raise UserError(f"a {config.stage} has no prompts; use a t2i config")
        check_tensor({**stage.frozen_networks, **stage.networks}, mesh)
        step, params = load_average(stage, mesh, workdir)
        params = {**load_frozen(stage, mesh), **params}
        pipeline = InstellaPipeline.from_stage(stage, params, mesh)
        return pipeline, _of_run(Path(workdir), step, stage)
    folder = model_folder.find_weights(config)
    description = model_folder.read_description(folder)
    tokenizer = (
        None if "tokenizer" in description else model_folder.find(config.tokenizer, "tokenizer")
    )
    encoder = config.text.encoder
    text_encoder = model_folder.find(encoder, "text.encoder") if encoder else None
    pipeline = InstellaPipeline.from_folder(
        folder,
        tokenizer,
        model_folder.execution(config.run),
        kind=config.stage,
        text_encoder=text_encoder,
        mesh=mesh,
    )
    generator = model_parts.find_generator(folder, description, config.stage)
    own_text = model_folder.has_weights(folder, "text") or text_encoder is None
    places = {
        "generator": (folder, generator),
        "text": (folder if own_text else text_encoder, "text"),
        "tokenizer": (tokenizer or folder, "tokenizer"),
    }
    digests = {name: digest(model_folder.weights_path(*place)) for name, place in places.items()}
    return pipeline, Weights(str(folder), None, digests)
