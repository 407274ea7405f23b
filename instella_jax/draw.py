"""`--mode=sample`: prompts of a config -> PNG files and a grid."""

import json
import logging
import os
import re
import time
from pathlib import Path

import jax
import numpy as np

from instella_jax import model_folder, sharding
from instella_jax.config import Config
from instella_jax.errors import UserError
from instella_jax.grids import save_grid, save_png
from instella_jax.pipeline import InstellaPipeline, options_from_config

logger = logging.getLogger(__name__)

MAX_PROMPTS = 100_000


def read_prompts(config: Config) -> list[str]:
    """Returns the prompts of a config's `sample` section.

    Raises:
      UserError: there is none, both places name some, or the file cannot be read.
    """
    if config.prompt and config.prompts_file:
        raise UserError("give sample.prompt or sample.prompts_file, not both")
    if config.prompt:
        return [config.prompt]
    if not config.prompts_file:
        raise UserError(
            'nothing to draw: give --config.sample.prompt="..." or '
            "--config.sample.prompts_file=FILE with one prompt a line"
        )
    path = Path(config.prompts_file)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"prompt file {path} cannot be read ({error})") from None
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"prompt file {path} is empty: expected one prompt a line")
    if len(prompts) > MAX_PROMPTS:
        raise UserError(f"prompt file {path} has {len(prompts)} prompts, at most {MAX_PROMPTS}")
    return prompts


def load_pipeline(
    config: Config, workdir: str | os.PathLike[str] | None
) -> tuple[InstellaPipeline, str]:
    """Finds the weights: a workdir's checkpoint > `init_from` > the shipped demo weights.

    Returns:
      The pipeline, and a phrase that says where its weights come from.

    Raises:
      UserError: there are no such weights.
    """
    from instella_jax.stages import make_stage
    from instella_jax.stages.generator import GeneratorStage

    mesh = sharding.make_mesh(config.mesh)
    if workdir is not None:
        stage = make_stage(config)
        if not isinstance(stage, GeneratorStage):
            raise UserError(f"a {config.stage} does not draw prompts; use a t2i config")
        step, params, frozen = restore(config, workdir)
        pipeline = InstellaPipeline.from_stage(stage, {**frozen, **params}, mesh)
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


def restore(config: Config, workdir: str | os.PathLike[str]):
    """Returns (step, averaged parameters, frozen parameters) of a workdir's newest checkpoint."""
    from instella_jax.checkpoint import check_config, restore_average
    from instella_jax.stages import init_stage, make_stage
    from instella_jax.train import load_frozen

    check_config(workdir, config)
    stage = make_stage(config)
    mesh = sharding.make_mesh(config.mesh)
    boxed = jax.eval_shape(lambda key: init_stage(stage, key), jax.random.key(0))
    like = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        sharding.values(boxed),
        sharding.tree_shardings(boxed, mesh),
    )
    step, params = restore_average(workdir, like)
    return step, params, load_frozen(stage, mesh)


def draw(config: Config, workdir: str | os.PathLike[str] | None) -> Path | None:
    """Draws the prompts of a config.

    Several processes draw together, and the first of them writes.

    Writes `<number>-<words of the prompt>-seed<seed>.png` for each picture, `grid-<number>.png`,
    and a line for each picture in `metadata.jsonl`. Numbers go on from what is there: nothing is
    overwritten.

    Args:
      config: a config of a generator.
      workdir: of a training run; None for `init_from` or the shipped weights.

    Returns:
      Path of the grid, None in other processes than the first.

    Raises:
      UserError: see `read_prompts`, `load_pipeline` and `Options`.
    """
    if "sample" not in config:
        raise UserError(f"a {config.stage} does not draw prompts; use a t2i config")
    prompts = read_prompts(config.sample)
    options = options_from_config(config.sample)
    out = Path(config.sample.out or (Path(workdir) / "drawn" if workdir else "drawn"))
    first = jax.process_index() == 0
    if first:
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot write pictures to {out} ({error.strerror})") from None
    pipeline, source = load_pipeline(config, workdir)
    count = len(prompts) * options.images_per_prompt
    if first:
        print(f"drawing {count} picture(s) with {source}")
    start = time.perf_counter()
    pictures = pipeline(prompts, options)
    seconds = time.perf_counter() - start
    if not first:
        return None
    captions = [p for p in prompts for _ in range(options.images_per_prompt)]
    grid = write(out, pictures, captions, options.seed, options.images_per_prompt, config)
    print(f"{count} picture(s) in {seconds:.1f} s, compiling included: {grid}")
    return grid


def write(
    out: Path,
    pictures: np.ndarray,
    captions: list[str],
    seed: int,
    per_prompt: int,
    config: Config,
) -> Path:
    """Writes pictures, metadata and grid; returns the grid's path."""
    number = next_number(out)
    first = number
    with (out / "metadata.jsonl").open("a", encoding="utf-8") as lines:
        for index, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
            own_seed = seed + index % per_prompt
            words = re.sub(r"[^a-z0-9]+", "-", caption.lower()).strip("-")[:60]
            name = f"{number:05d}-{words}-seed{own_seed}.png"
            save_png(out / name, picture)
            settings = {
                k: v for k, v in config.sample.items() if k not in ("prompt", "prompts_file", "out")
            }
            row = {"file_name": name, "text": caption, **settings, "seed": own_seed}
            lines.write(json.dumps(row) + "\n")
            number += 1
    path = out / f"grid-{first:05d}.png"
    save_grid(path, pictures, captions)
    return path


def next_number(out: Path) -> int:
    """Returns one more than the greatest number of a picture in a folder, 0 for the first."""
    numbers = [int(m[1]) for p in out.iterdir() if (m := re.match(r"(?:grid-)?(\d{5,})", p.name))]
    return max(numbers, default=-1) + 1
