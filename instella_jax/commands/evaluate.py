"""`--mode=eval`: held-out figures of a stage, from a workdir or from a model folder."""

import contextlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from instella_jax.codec.tokenizer import BinaryTokenizer
from instella_jax.commands.measure_reconstruction import find_lpips
from instella_jax.config import Config
from instella_jax.config_keys import check_values
from instella_jax.evaluation import reconstruction, scenes
from instella_jax.evaluation.heldout import evaluate
from instella_jax.evaluation.reports import provenance
from instella_jax.models.functional import check_tensor
from instella_jax.reporting.pictures import save_grid
from instella_jax.runtime import sharding
from instella_jax.runtime.files import write_json
from instella_jax.sampling.previews import Preview, preview
from instella_jax.sampling.sampler import Sampler
from instella_jax.stages import make_stage
from instella_jax.stages.base import Stage
from instella_jax.stages.generator import GeneratorStage
from instella_jax.stages.parameters import (
    load_average,
    load_frozen,
    load_trained,
    with_target_of_weights,
)
from instella_jax.stages.tokenizer import TokenizerStage
from instella_jax.training.workdir import USED, check_config
from instella_jax.weights import model_folder

GRID = 32


def evaluate_config(
    config: Config,
    workdir: str | os.PathLike[str] | None,
    tell: Callable[[dict[str, Any]], None] = lambda report: None,
) -> dict[str, float]:
    """Print and return the held-out metrics of a stage.

    Args:
      config: of the stage.
      workdir: of a training run; None for `init_from` or the shipped weights.
      tell: called in the first process with all that is printed, as JSON has it.

    Raises:
      UserError: there are no such weights, or the data cannot be read.
    """
    check_values(config)
    if workdir is None:
        config = with_target_of_weights(config)
    mesh = sharding.make_mesh(config.mesh)
    stage = make_stage(config)
    check_tensor({**stage.frozen_networks, **stage.networks}, mesh)
    with sharding.use(mesh):
        if workdir is not None:
            check_config(workdir, config, free=USED)
            step, params = load_average(stage, mesh, workdir)
            frozen = load_frozen(stage, mesh)
            source = f"step {step} of {workdir}"
        else:
            params, frozen = load_trained(stage, config, mesh), load_frozen(stage, mesh)
            source = str(model_folder.find_weights(config))
        metrics = evaluate(stage, params, frozen, config, mesh)
    print_line(f"held out, with {source}:")
    show(metrics)
    report: dict[str, Any] = {"stage": config.stage, "weights": source, "heldout": metrics}
    folder = Path(workdir or "drawn")
    if isinstance(stage, TokenizerStage):
        own = params["tokenizer"]
        report["reconstruction"] = report_reconstruction(stage, own, config, mesh, folder)
    if config.data.kind == "scenes":
        out = folder / f"heldout-{config.stage}.png"
        report |= report_scenes(stage, {**frozen, **params}, config, mesh, out)
    if jax.process_index() == 0:
        tell(report)
    return metrics


def report_reconstruction(
    stage: TokenizerStage, params: Any, config: Config, mesh: Mesh, folder: Path
) -> dict[str, float]:
    """Print and return PSNR, SSIM and LPIPS of held-out pictures; write `reconstruction.json`."""
    size = config.eval.batch_size
    tokenizer = BinaryTokenizer(stage.network, params, shapes=(), mesh=mesh, batch_size=size)
    lpips_params = find_lpips("")
    with contextlib.closing(stage.loader("heldout", batch_size=size)) as loader:
        batches = (b["image"] for _, b in zip(range(config.eval.batches), loader, strict=False))
        measured = reconstruction.measure(tokenizer, batches, lpips_params=lpips_params)
    print_line(f"{measured['pictures']} held-out pictures, each with its copy:")
    show(measured["scores"])
    if jax.process_index() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        report = {**measured, "config": json.loads(config.to_json_best_effort())}
        write_json(folder / "reconstruction.json", {**report, "provenance": provenance()})
    return measured["scores"]


def report_scenes(
    stage: Stage, params: Any, config: Config, mesh: Mesh, out: Path
) -> dict[str, Any]:
    """Print and return the metrics that the facts of emoji scenes allow; save a grid of images."""
    if isinstance(stage, GeneratorStage):
        report = scenes.prompts_report(Sampler.from_stage(stage, params, mesh), config)
        print_line(f"share right of {scenes.PROMPTS} held-out prompts:")
        show(report.sampled)
        print_line("the same of true pictures through the tokenizer (the ceiling):")
        show(report.ceiling)
        shown = Preview(report.pictures[:GRID], report.prompts[:GRID])
        found = {"sampled": report.sampled, "ceiling": report.ceiling}
    elif isinstance(stage, TokenizerStage):
        print_line("512 held-out scenes, and PCA with as many bits:")
        found = {"scenes": scenes.tokenizer_report(stage.network, params["tokenizer"], config)}
        show(found["scenes"])
        shown = preview(stage, params, {}, GRID // 2)
    else:
        return {}
    if jax.process_index() == 0:
        save_grid(out, *shown)
    print_line(f"pictures: {out}")
    return {**found, "pictures": str(out)}


def print_line(line: str) -> None:
    """Print a line, in the first of several processes."""
    if jax.process_index() == 0:
        print(line, flush=True)


def show(metrics: dict[str, float]) -> None:
    """Print a line for each metric."""
    for name, value in metrics.items():
        print_line(f"  {name.replace('_', ' ')} {value:.4f}")
