"""`--mode=sample`: prompts of a config -> PNG files and a grid."""

import contextlib
import json
import os
import re
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from instella_jax import model_folder, sharding
from instella_jax.config import Config
from instella_jax.errors import UserError
from instella_jax.grids import save_grid, save_png
from instella_jax.metrics import Progress, Throughput, progress_line
from instella_jax.pipeline import InstellaPipeline, options_from_config

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
    from instella_jax.run_setup import check_tensor
    from instella_jax.stages import make_stage
    from instella_jax.stages.generator import GeneratorStage

    mesh = sharding.make_mesh(config.mesh)
    if workdir is not None:
        stage = make_stage(config)
        if not isinstance(stage, GeneratorStage):
            raise UserError(f"a {config.stage} does not draw prompts; use a t2i config")
        check_tensor({**stage.frozen_networks, **stage.networks}, mesh)
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
    from instella_jax.params_checkpoint import restore_average
    from instella_jax.run_setup import load_frozen
    from instella_jax.stages import init_stage, make_stage
    from instella_jax.workdir_config import check_config

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

    Writes, batch by batch, `<number>-<words of the prompt>-seed<seed>.png` for each picture, a
    line for each in `metadata.jsonl`, and `grid-<number of its first picture>.png` for every
    `pictures_in_a_grid`. Numbers go on from what is there: nothing is overwritten.

    Args:
      config: a config of a generator.
      workdir: of a training run; None for `init_from` or the shipped weights.

    Returns:
      Path of the last grid, None in other processes than the first.

    Raises:
      UserError: see `read_prompts`, `load_pipeline`, `Options` and `Album`.
    """
    if "sample" not in config:
        raise UserError(f"a {config.stage} does not draw prompts; use a t2i config")
    prompts = read_prompts(config.sample)
    options = options_from_config(config.sample)
    out = Path(config.sample.out or (Path(workdir) / "drawn" if workdir else "drawn"))
    first = jax.process_index() == 0
    pipeline, source = load_pipeline(config, workdir)
    batches = pipeline.batches(prompts, options)
    captions = [p for p in prompts for _ in range(options.images_per_prompt)]
    progress, rate = Progress(enabled=first), Throughput()
    progress.message(f"drawing {len(captions)} picture(s) with {source}")
    album = Album(out, captions, config.sample) if first else None
    start, done = time.perf_counter(), 0
    with contextlib.closing(progress):
        for pictures in batches:
            if album is not None:
                album.add(pictures)
            done += len(pictures)
            # The first batch, which compiles, says nothing of the speed.
            rate.update(done)
            line = progress_line(done, len(captions), {}, rate.steps_per_second, noun="picture")
            progress.update(line)
    if album is None:
        return None
    grid = album.close()
    seconds = time.perf_counter() - start
    print(f"{len(captions)} picture(s) in {seconds:.1f} s, compiling included: {grid}")
    return grid


class Album:
    """Writes pictures as they come: PNG files, `metadata.jsonl`, and a grid every so often."""

    def __init__(self, out: Path, captions: list[str], sample: Config):
        """Makes the folder, or goes on after the numbers that are there.

        Args:
          out: the folder.
          captions: prompt of each picture that will come, those of a prompt together.
          sample: the config's `sample` section, which `metadata.jsonl` repeats.

        Raises:
          UserError: the folder cannot be made.
        """
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _cannot_write(out, error) from None
        self._out, self._captions, self._sample = out, captions, sample
        self._first, self._done = next_number(out), 0
        self._sheet: list[np.ndarray] = []
        self._grid = out

    def add(self, pictures: np.ndarray) -> None:
        """Writes the next pictures, uint8 [n, height, width, 3].

        Raises:
          UserError: the folder cannot be written; what was written before stays.
        """
        try:
            with (self._out / "metadata.jsonl").open("a", encoding="utf-8") as lines:
                for picture in pictures:
                    lines.write(json.dumps(self._write(picture)) + "\n")
                    self._sheet.append(picture)
                    if len(self._sheet) == pictures_in_a_grid(*picture.shape[:2]):
                        self._write_grid()
        except OSError as error:
            raise _cannot_write(self._out, error) from None

    def close(self) -> Path:
        """Writes the last grid and returns its path."""
        try:
            if self._sheet:
                self._write_grid()
        except OSError as error:
            raise _cannot_write(self._out, error) from None
        return self._grid

    def _write(self, picture: np.ndarray) -> dict[str, Any]:
        """Writes one PNG and returns its line of metadata."""
        caption = self._captions[self._done]
        seed = self._sample.seed + self._done % self._sample.images_per_prompt
        words = re.sub(r"[^a-z0-9]+", "-", caption.lower()).strip("-")[:60]
        name = f"{self._first + self._done:05d}-{words}-seed{seed}.png"
        save_png(self._out / name, picture)
        self._done += 1
        left_out = ("prompt", "prompts_file", "out")
        settings = {k: v for k, v in self._sample.items() if k not in left_out}
        return {"file_name": name, "text": caption, **settings, "seed": seed}

    def _write_grid(self) -> None:
        """Writes the grid of the pictures since the last one, with the number of its first."""
        start = self._done - len(self._sheet)
        self._grid = self._out / f"grid-{self._first + start:05d}.png"
        save_grid(self._grid, np.stack(self._sheet), self._captions[start : self._done])
        self._sheet = []


def pictures_in_a_grid(height: int, width: int) -> int:
    """Returns how many pictures of a size are shown together: at most 64, and 64 megapixels."""
    return max(1, min(64, 64 * 2**20 // (height * width)))


def _cannot_write(out: Path, error: OSError) -> UserError:
    return UserError(f"cannot write pictures to {out} ({error.strerror})")


def next_number(out: Path) -> int:
    """Returns one more than the greatest number of a picture in a folder, 0 for the first."""
    numbers = [int(m[1]) for p in out.iterdir() if (m := re.match(r"(?:grid-)?(\d{5,})", p.name))]
    return max(numbers, default=-1) + 1
