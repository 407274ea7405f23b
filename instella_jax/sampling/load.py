"""Where the weights to sample with come from."""

import dataclasses
import functools
import os
from pathlib import Path
from typing import Any

import jax

from instella_jax.config import Config
from instella_jax.errors import UserError
from instella_jax.models.functional import check_tensor
from instella_jax.models.layers import Execution
from instella_jax.runtime import sharding
from instella_jax.runtime.digest import digest
from instella_jax.sampling.sampler import Sampler
from instella_jax.stages import make_stage
from instella_jax.stages.generator import GeneratorStage
from instella_jax.stages.parameters import load_average, load_frozen
from instella_jax.weights import lora_files, model_folder, model_parts


@dataclasses.dataclass(frozen=True)
class Weights:
    """Which weights a sampler samples with.

    Attributes:
      folder: the model folder, or the workdir of a run.
      step: of the run's checkpoint, None for a model folder.
      paths: files, or folders, by the part that their weights are of; "checkpoint" is a run's, by
        its manifest.
      adapters: folders of adapters that the generator has beside them, each with its scale.
    """

    folder: str
    step: int | None
    paths: dict[str, Path]
    adapters: tuple[tuple[str, float], ...] = ()

    @functools.cached_property
    def digests(self) -> dict[str, str]:
        """What tells the bytes of each part from those of others."""
        return {name: digest(path) for name, path in self.paths.items()}

    def __str__(self) -> str:
        """Say it in words."""
        return self.folder if self.step is None else f"step {self.step} of {self.folder}"

    def record(self) -> dict[str, Any]:
        """Return it as JSON has it."""
        step = {} if self.step is None else {"step": self.step}
        adapters = {"lora": [list(one) for one in self.adapters]} if self.adapters else {}
        return {"folder": self.folder, **step, **adapters, "digests": self.digests}


def _of_run(workdir: Path, step: int, stage: GeneratorStage) -> Weights:
    """Return which weights a checkpoint, and the stage's frozen parts, have."""
    manifest = workdir / "checkpoints" / str(step) / "manifest.json"
    paths = {
        "checkpoint": manifest,
        "tokenizer": model_folder.weights_path(stage.tokenizer_folder, "tokenizer"),
    }
    if not stage.config.text.trainable:
        paths["text"] = model_folder.weights_path(stage.text_folder, "text")
    if stage.adapters is not None:
        base = stage.base_folder
        description = model_folder.read_description(base)
        part = model_parts.find_generator(base, description, stage.kind)
        paths["generator"] = model_folder.weights_path(base, part)
    found = {name: path for name, path in paths.items() if path.exists()}
    return Weights(str(workdir), step, found)


def load_sampler(config: Config, workdir: str | os.PathLike[str] | None) -> tuple[Sampler, Weights]:
    """Find the weights: a workdir's checkpoint > `init_from` > the shipped demo weights.

    Returns:
      The sampler, and which weights it has.

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
        sampler = Sampler.from_stage(stage, params, mesh)
        return sampler, _of_run(Path(workdir), step, stage)
    folder = model_folder.find_weights(config)
    description = model_folder.read_description(folder)
    tokenizer = (
        None if "tokenizer" in description else model_folder.find(config.tokenizer, "tokenizer")
    )
    encoder = config.text.encoder
    text_encoder = model_folder.find(encoder, "text.encoder") if encoder else None
    run = model_folder.execution(config.run)
    return open_folders(folder, tokenizer, text_encoder, kind=config.stage, run=run, mesh=mesh)


def open_folders(
    folder: Path,
    tokenizer: Path | None = None,
    text_encoder: Path | None = None,
    text_tokenizer: Path | None = None,
    *,
    kind: str | None = None,
    run: Execution = Execution(),  # noqa: B008 (frozen)
    mesh: jax.sharding.Mesh | None = None,
) -> tuple[Sampler, Weights]:
    """Read model folders that hold a generator, a tokenizer and a text encoder between them.

    Args: see `Sampler.from_folder`.

    Raises:
      UserError: likewise.
    """
    sampler = Sampler.from_folder(
        folder,
        tokenizer,
        run,
        kind=kind,
        text_encoder=text_encoder,
        text_tokenizer=text_tokenizer,
        mesh=mesh,
    )
    description = model_folder.read_description(folder)
    generator = model_parts.find_generator(folder, description, kind)
    own_text = model_folder.has_weights(folder, "text") or text_encoder is None
    places = {
        "generator": (folder, generator),
        "text": (folder if own_text else text_encoder, "text"),
        "tokenizer": (tokenizer or folder, "tokenizer"),
    }
    paths = {name: model_folder.weights_path(*place) for name, place in places.items()}
    return sampler, Weights(str(folder), None, paths)


def add_adapters(
    sampler: Sampler, weights: Weights, folder: str | os.PathLike[str], scale: float, merged: bool
) -> tuple[Sampler, Weights]:
    """Return a sampler whose generator has the adapters of a folder, in addition to any it has.

    Args:
      sampler: with the generator that they were trained on.
      weights: of the sampler.
      folder: with `adapter_config.json` and `adapter_model.safetensors`.
      scale: how much of them, 1 being what was trained.
      merged: whether they become part of the kernels.

    Raises:
      UserError: there are none, or those of another model.
    """
    adapters, own = lora_files.load(folder, sampler.generator)
    name = f"lora {len(weights.adapters) + 1} x {scale:g}"
    weights = dataclasses.replace(
        weights,
        paths={**weights.paths, name: Path(folder) / lora_files.WEIGHTS},
        adapters=(*weights.adapters, (os.fspath(folder), float(scale))),
    )
    return sampler.with_adapters(adapters, scale * own, merged), weights
