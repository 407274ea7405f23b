"""`--mode=sample`: prompts of a config -> PNG files and a grid."""

import contextlib
import os
import time
from pathlib import Path

import jax

from instella_jax.config import Config
from instella_jax.config_keys import check_values
from instella_jax.errors import UserError
from instella_jax.reporting.progress import Progress, Throughput, progress_line
from instella_jax.sampling.album import Album
from instella_jax.sampling.load import load_sampler
from instella_jax.sampling.sampler import options_from_config, requests_of
from instella_jax.training.workdir import USED, check_config

MAX_PROMPTS = 100_000


def read_prompts(config: Config) -> list[str]:
    """Return the prompts of a config's `sample` section.

    Raises:
      UserError: there is none, both places name some, or the file cannot be read.
    """
    if config.prompt and config.prompts_file:
        raise UserError("give sample.prompt or sample.prompts_file, not both")
    if config.prompt:
        return [config.prompt]
    if not config.prompts_file:
        raise UserError(
            'there is no prompt: give --config.sample.prompt="..." or '
            "--config.sample.prompts_file=FILE with one prompt a line"
        )
    path = Path(config.prompts_file)
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise UserError(f"prompt file {path} cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise UserError(
            f"prompt file {path} cannot be read as UTF-8 ({error.reason} at byte {error.start}): "
            "save it as UTF-8"
        ) from None
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"prompt file {path} is empty: expected one prompt a line")
    if len(prompts) > MAX_PROMPTS:
        raise UserError(f"prompt file {path} has {len(prompts)} prompts, at most {MAX_PROMPTS}")
    return prompts


def generate(config: Config, workdir: str | os.PathLike[str] | None) -> Path | None:
    """Generate images of the prompts of a config.

    Several processes sample together, and the first of them writes.

    Writes, batch by batch, `<number>-<words of the prompt>-seed<seed>.png` for each picture, a
    line for each in `metadata.jsonl`, and `grid-<number of its first picture>.png` for every
    `pictures_in_a_grid`. Numbers go on from what is there: nothing is overwritten.

    Args:
      config: a config of a generator.
      workdir: of a training run; None for `init_from` or the shipped weights.

    Returns:
      Path of the last grid, None in other processes than the first.

    Raises:
      UserError: see `read_prompts`, `load_sampler`, `Options` and `Album`.
    """
    if "sample" not in config:
        raise UserError(f"a {config.stage} has no prompts; use a t2i config")
    check_values(config)
    prompts = read_prompts(config.sample)
    options = options_from_config(config.sample)
    out = Path(config.sample.out or (Path(workdir) / "drawn" if workdir else "drawn"))
    first = jax.process_index() == 0
    if workdir is not None:
        check_config(workdir, config, free=USED)
    sampler, weights = load_sampler(config, workdir)
    batches = sampler.batches(requests_of(prompts, options), options)
    captions = [p for p in prompts for _ in range(options.images_per_prompt)]
    progress, rate = Progress(enabled=first), Throughput()
    progress.message(f"sampling {len(captions)} picture(s) with {weights}")
    album = Album(out, captions, config.sample, weights.record()) if first else None
    start, done = time.perf_counter(), 0
    with contextlib.closing(progress):
        for pictures, _ in batches:
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
