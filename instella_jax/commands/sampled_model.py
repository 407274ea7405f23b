"""The model that `instella-jax eval` samples with: its arguments, its config, its processes."""

import argparse
import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from instella_jax.errors import UserError
from instella_jax.user_paths import expand

# Shipped models by the name of the config that they belong to.
_SHIPPED = {"demo": "t2i_diffusion", "demo_ar": "t2i_ar"}
_SAMPLING = {
    "guidance": (float, "g in (1 + g) conditional - g unconditional"),
    "steps": (int, "of the diffusion sampler"),
    "temperature": (float, "of the guided logits"),
    "seed": (int, "of the first picture of every prompt; picture j has SEED + j"),
    "batch_size": (int, "pictures at a time"),
    "height": (int, "of the pictures in pixels"),
    "width": (int, "likewise"),
}


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the model to sample with, and how, as all actions that sample take them."""
    parser.add_argument(
        "model",
        type=expand,
        metavar="MODEL",
        help="model folder or workdir of a run, or demo or demo_ar, which are shipped",
    )
    parser.add_argument(
        "--config",
        metavar="CONFIG[:VARIANT]",
        help="what a model folder is sampled by: settings, mesh, world of scenes (default: the "
        "demo's of its kind; a run has its own)",
    )
    parser.add_argument(
        "--tokenizer", type=expand, metavar="DIR",
        help="model folder of the image tokenizer, where MODEL has none (default: the config's)",
    )  # fmt: skip
    parser.add_argument(
        "--text-encoder", type=expand, metavar="DIR", help="likewise of the text encoder"
    )
    for name, (kind, meaning) in _SAMPLING.items():
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, type=kind, help=f"{meaning} (default: the config's)")
    add_distributed(parser)


def add_distributed(parser: argparse.ArgumentParser) -> None:
    """Add how `joined` finds the other processes."""
    parser.add_argument(
        "--distributed", default="auto", choices=("auto", "off", "slurm", "tpu"),
        help="how processes that share the work find each other, as in training "
        "(default: %(default)s)",
    )  # fmt: skip


def find_config(options: argparse.Namespace) -> tuple[Any, str | None]:
    """Return the config to sample with, and the workdir where MODEL is a run.

    Raises:
      UserError: there is no such model.
    """
    from instella_jax.commands import config_file, own_config
    from instella_jax.training.workdir import read_config
    from instella_jax.weights import model_folder, model_parts

    folder, workdir = Path(options.model), None
    if options.model in _SHIPPED:
        config = config_file.load_config(
            config_file.find_config(options.config or _SHIPPED[options.model])
        )
    elif (folder / "checkpoints").is_dir():
        workdir = options.model
        read_config(workdir)
        named = options.config and config_file.find_config(options.config)
        config = own_config.get_config(json.dumps({"workdir": workdir, "config": named}))
    else:
        description = model_folder.read_description(folder)
        part = model_parts.find_generator(folder, description)
        kind = description[part]["kind"]
        name = options.config or f"t2i_{kind}"
        config = config_file.load_config(config_file.find_config(name))
        config.init_from = options.model
    if options.tokenizer:
        config.tokenizer = options.tokenizer
    if options.text_encoder:
        config.text.encoder = options.text_encoder
    changes = {name: getattr(options, name) for name in _SAMPLING}
    changes = {name: value for name, value in changes.items() if value is not None}
    if unknown := sorted(changes.keys() - config.sample.keys()):
        raise UserError(
            f"{options.model} takes no --{unknown[0]}: its generator has no such setting"
        )
    config.sample.update(changes)
    return config, workdir


@contextlib.contextmanager
def joined(options: argparse.Namespace) -> Iterator[None]:
    """Join the other processes, find the devices, and end with the others."""
    from instella_jax.runtime import compile_cache, devices, distributed
    from instella_jax.runtime.failure import end_together

    distributed.join(distributed.detect(os.environ, options.distributed))
    with end_together():
        compile_cache.use_cache()
        devices.find_devices()
        yield
