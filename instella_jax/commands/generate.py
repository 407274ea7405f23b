"""Prompts to PNG files: `instella-jax generate`, and `--mode=sample` of a config's run."""

import argparse
import contextlib
import dataclasses
import itertools
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from instella_jax.commands.generate_arguments import EXAMPLES, add_arguments
from instella_jax.commands.prompts import Prompt, read_prompts
from instella_jax.config import Config
from instella_jax.config_keys import check_values
from instella_jax.errors import UserError

if TYPE_CHECKING:
    import numpy as np

    from instella_jax.reporting.progress import Progress
    from instella_jax.sampling.load import Weights
    from instella_jax.sampling.options import Options, Request
    from instella_jax.sampling.sampler import Sampler


class Work(NamedTuple):
    """Pictures of one size."""

    requests: Sequence["Request"]
    options: "Options"


class Made(NamedTuple):
    """A batch of pictures, with what each says of itself."""

    pictures: "np.ndarray"
    records: list[dict[str, Any]]


def add_parser(commands: Any) -> None:
    """Add `generate` to the parser of the console command."""
    parser = commands.add_parser(
        "generate",
        help="prompts -> pictures",
        description="Generates pictures of prompts, with the shipped demo weights where no model "
        "is named. Each PNG file says how it was made.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    add_arguments(parser)


def run(given: argparse.Namespace) -> None:
    """Run `instella-jax generate`.

    Raises:
      UserError: an argument cannot be used, or there is no such model.
    """
    source = _repeated(given) if given.source else {}
    prompts = _prompts(given, source)
    file = given.out if given.out is not None and given.out.suffix.lower() == ".png" else None
    count = 1 if given.count is None else given.count
    if file is not None:
        if len(prompts) * count != 1:
            raise UserError(f"{len(prompts) * count} pictures do not go into {file}: name a folder")
        if file.exists() and not given.force:
            raise UserError(f"{file} is there already: give another --out, or --force")
    stream = sys.stderr if given.json else sys.stdout

    from instella_jax.reporting.progress import Progress
    from instella_jax.sampling.load import add_adapters
    from instella_jax.sampling.pretrained import open_model

    _start()
    model = open_model(
        given.model or source.get("weights", {}).get("folder", "demo"),
        tokenizer=given.tokenizer,
        text_encoder=given.text_encoder,
        kind=given.kind or source.get("kind"),
        run=_execution(given.dtype or source.get("dtype", "float32")),
    )
    # The adapters of a picture that is made again are those of its model, and of no other.
    adapters = given.lora or ([] if given.model else source.get("weights", {}).get("lora", []))
    sampler, weights = model.sampler, model.weights
    for folder, scale in adapters:
        sampler, weights = add_adapters(sampler, weights, folder, scale, merged=True)
    model = dataclasses.replace(model, sampler=sampler, weights=weights)
    if source:
        _check_weights(given, source, model.weights)
    work = make_work(prompts, _options(given, source, model.sampling))
    batch, text_tokens = source.get("batch", 0), source.get("text_tokens", 0)
    progress = Progress(stream)
    start = time.perf_counter()
    if file is not None:
        (made,) = sample(model.sampler, model.weights, work, progress, batch, text_tokens)
        _write_one(file, made)
        paths = [file]
        _say(given.json, paths, made.records)
    else:
        paths = _fill(given, model, work, progress, batch, text_tokens)
    seconds = time.perf_counter() - start
    print(f"{len(paths)} picture(s) in {seconds:.1f} s: {paths[-1]}", file=stream, flush=True)


def _fill(
    given: argparse.Namespace,
    model: Any,
    work: Sequence[Work],
    progress: "Progress",
    batch: int,
    text_tokens: int,
) -> list[Path]:
    """Write pictures to a folder and return their files."""
    from instella_jax.sampling.album import Album

    batches = sample(model.sampler, model.weights, work, progress, batch, text_tokens)
    album, paths = Album(given.out or Path("drawn")), []
    for made in batches:
        files = album.add(made.pictures, made.records)
        _say(given.json, files, made.records)
        paths += files
    album.close()
    return paths


def _write_one(file: Path, made: Made) -> None:
    from instella_jax.reporting.pictures import save_png
    from instella_jax.sampling.records import as_texts

    try:
        save_png(file, made.pictures[0], as_texts(made.records[0]))
    except OSError as error:
        raise UserError(f"cannot write {file} ({error.strerror})") from None


def _say(as_json: bool, files: Sequence[Path], records: Sequence[dict[str, Any]]) -> None:
    if as_json:
        for file, record in zip(files, records, strict=True):
            print(json.dumps({"file": str(file), **record}), flush=True)


def _start() -> None:
    """Turn the compile cache on; a sampler uses one device of a CPU."""
    from instella_jax.runtime.compile_cache import use_cache
    from instella_jax.runtime.devices import find_devices

    use_cache(0.0)  # most of a short command is many small programs
    find_devices()


def _execution(dtype: str) -> Any:
    from instella_jax.models.layers import Execution

    return Execution(dtype=dtype, param_dtype=dtype)


# Options by the argument that changes them.
_CHANGES = {
    "guidance": "guidance", "temperature": "temperature", "steps": "steps", "rho": "rho",
    "protocol": "protocol", "height": "height", "width": "width", "batch_size": "batch_size",
    "seed": "seed", "negative_prompt": "negative_prompt", "count": "images_per_prompt",
}  # fmt: skip


def _repeated(given: argparse.Namespace) -> dict[str, Any]:
    """Return the record of the picture to make again."""
    from instella_jax.sampling.records import read_record

    record = read_record(given.source)
    if given.count not in (None, 1) or given.prompts:
        # Another batch is another order of sums: near to the picture, and not the picture.
        record.pop("batch")
    return record


def _prompts(given: argparse.Namespace, source: dict[str, Any]) -> list[Prompt]:
    if bool(given.prompt) + bool(given.prompts) > 1:
        raise UserError("give prompts or --prompts, not both")
    if given.prompts:
        return read_prompts(given.prompts)
    if source and not given.prompt:
        negative, seed = source["negative_prompt"], source["seed"]
        negative = negative if given.negative_prompt is None else given.negative_prompt
        return [Prompt(source["text"], negative, seed if given.seed is None else given.seed)]
    if not given.prompt:
        raise UserError(
            'there is no prompt: give one, as in instella-jax generate "a cat above a blue '
            'square", or --prompts FILE, or --from PNG'
        )
    return [Prompt(text) for text in given.prompt]


def _check_weights(given: argparse.Namespace, source: dict[str, Any], weights: "Weights") -> None:
    """Check that a picture is made again with the weights that made it.

    Raises:
      UserError: they are others, and no --model was asked for.
    """
    theirs, ours = source["weights"]["digests"], weights.digests
    differing = [part for part in sorted({*theirs, *ours}) if theirs.get(part) != ours.get(part)]
    if differing and given.model is None and given.lora is None:
        raise UserError(
            f"{given.source} was made with other weights than {weights} has (differing: "
            f"{', '.join(differing)}): give --model with those, or with any to try"
        )


def _options(
    given: argparse.Namespace, source: dict[str, Any], sampling: dict[str, float]
) -> "Options":
    """Return the settings: those that are given > those of the picture > the model's own.

    Raises:
      UserError: one is out of its range.
    """
    from instella_jax.sampling.options import Options

    names = {field.name for field in dataclasses.fields(Options)} - {"seed", "negative_prompt"}
    values = {**sampling, **{k: v for k, v in source.items() if k in names}}
    if given.guidance_scale is not None:
        if not 0 <= given.guidance_scale <= 1_001:
            raise UserError(f"--guidance-scale is {given.guidance_scale:g}: expected 0 to 1001")
        values["guidance"] = max(0.0, given.guidance_scale - 1.0)
    for argument, name in _CHANGES.items():
        if (value := getattr(given, argument)) is not None:
            values[name] = value
    return Options(**values)


def make_work(prompts: Sequence[Prompt], options: "Options") -> list[Work]:
    """Return what to sample, pictures of one size that follow each other together.

    What a line of a prompt file says of its own counts before the options.

    Raises:
      UserError: a seed or a size is out of its range.
    """
    from instella_jax.sampling.options import requests_of

    work = []
    for size, group in itertools.groupby(prompts, key=lambda p: (p.height, p.width)):
        height, width = (a or b for a, b in zip(size, (options.height, options.width), strict=True))
        whole = dataclasses.replace(options, height=height, width=width)
        requests = []
        for one in group:
            seed = options.seed if one.seed is None else one.seed
            negative = one.negative_prompt
            negative = options.negative_prompt if negative is None else negative
            own = dataclasses.replace(whole, seed=seed, negative_prompt=negative)
            requests += requests_of(one.prompt, own)
        work.append(Work(requests, whole))
    return work


def sample(
    sampler: "Sampler",
    weights: "Weights",
    work: Sequence[Work],
    progress: "Progress",
    batch: int = 0,
    text_tokens: int = 0,
) -> Iterator[Made]:
    """Sample pictures and show how far it is.

    What cannot be sampled is refused before the first batch is asked for.

    Args:
      sampler: with its networks.
      weights: of the sampler.
      work: what to sample.
      progress: where to show it.
      batch: how many pictures to sample at once where there is one alone; 0 for as many as there
        are.
      text_tokens: prompts are padded to at least so many tokens.

    Raises:
      UserError: see `Sampler.batches`.
    """
    batches = []
    for requests, options in work:
        rows = list(requests) * batch if batch and len(requests) == 1 else list(requests)
        options = dataclasses.replace(options, batch_size=max(options.batch_size, batch))
        texts = [text for request in rows for text in request[:2]]
        length = max(sampler.text_length(texts), text_tokens) if rows else 0
        size = sampler.batch_size(len(rows), options)
        found = sampler.batches(rows, options, text_length=text_tokens)
        batches.append((list(requests), options, size, length, found))
    return _sample(sampler, weights, batches, progress)


def _sample(
    sampler: "Sampler", weights: "Weights", batches: Sequence[Any], progress: "Progress"
) -> Iterator[Made]:
    from instella_jax.reporting.progress import Throughput, progress_line
    from instella_jax.sampling.records import make_record

    total, done = sum(len(requests) for requests, *_ in batches), 0
    rate = Throughput()
    progress.message(f"sampling {total} picture(s) with {weights}; a new size is compiled first")
    with contextlib.closing(progress):
        for requests, options, size, length, found in batches:
            for number, samples in enumerate(found):
                own = requests[number * size : (number + 1) * size]
                records = [
                    make_record(sampler, weights, request, options, size, length) for request in own
                ]
                yield Made(samples.images[: len(own)], records)
                done += len(own)
                # The first batch, which compiles, says nothing of the speed.
                rate.update(done)
                line = progress_line(done, total, {}, rate.steps_per_second, noun="picture")
                progress.update(line)


def configured_prompts(config: Config) -> list[Prompt]:
    """Return the prompts of a config's `sample` section.

    Raises:
      UserError: there is none, both places name some, or the file cannot be read.
    """
    if config.prompt and config.prompts_file:
        raise UserError("give sample.prompt or sample.prompts_file, not both")
    if config.prompt:
        return [Prompt(config.prompt)]
    if not config.prompts_file:
        raise UserError(
            'there is no prompt: give --config.sample.prompt="..." or '
            "--config.sample.prompts_file=FILE with one prompt a line"
        )
    return read_prompts(config.prompts_file)


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
      UserError: see `configured_prompts`, `load_sampler`, `Options` and `Album`.
    """
    import jax

    from instella_jax.reporting.progress import Progress
    from instella_jax.sampling.album import Album
    from instella_jax.sampling.load import load_sampler
    from instella_jax.sampling.options import options_from_config
    from instella_jax.training.workdir import USED, check_config

    if "sample" not in config:
        raise UserError(f"a {config.stage} has no prompts; use a t2i config")
    check_values(config)
    prompts = configured_prompts(config.sample)
    options = options_from_config(config.sample)
    out = Path(config.sample.out or (Path(workdir) / "drawn" if workdir else "drawn"))
    first = jax.process_index() == 0
    if workdir is not None:
        check_config(workdir, config, free=USED)
    sampler, weights = load_sampler(config, workdir)
    start, count = time.perf_counter(), 0
    batches = sample(sampler, weights, make_work(prompts, options), Progress(enabled=first))
    album = Album(out) if first else None
    for made in batches:
        count += len(made.records)
        if album is not None:
            album.add(made.pictures, made.records)
    if album is None:
        return None
    grid = album.close()
    seconds = time.perf_counter() - start
    print(f"{count} picture(s) in {seconds:.1f} s, compiling included: {grid}")
    return grid
