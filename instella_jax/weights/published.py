"""The published checkpoints -> a model folder.

A published model is a folder with `bae/model.safetensors` and one or both of `diffusion.pt` and
`ar.pt`, beside an OLMo folder with `config.json`, `model.safetensors` (or shards) and a text
tokenizer. Where there is no torch to read `.pt` with, safetensors files of the same tensors
(`diffusion.safetensors`) can take their place.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from instella_jax.errors import UserError
from instella_jax.models.functional import Network
from instella_jax.models.olmo import Olmo
from instella_jax.models.text import TextTokenizer, tokenizer_files
from instella_jax.models.tokenizer import TokenizerNetwork
from instella_jax.runtime.files import fresh_folder, write_json
from instella_jax.weights import (
    convert,
    model_folder,
    model_parts,
    reference_names,
    reference_sizes,
)
from instella_jax.weights.tensor_files import (
    Spec,
    Tensors,
    open_model,
    open_safetensors,
    read_json_file,
    write_safetensors,
)
from instella_jax.weights.torch_files import open_torch

TOKENIZER_FILE = "bae/model.safetensors"
GENERATOR_FILES = {kind: f"{kind}.pt" for kind in model_parts.GENERATORS}
TEXT_FOLDER = "text_encoder"
# The published system cuts prompts here.
MAX_LENGTH = 128
# Pictures of 512 with the published patches of 16.
PATCHES = 32


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of a published model.

    Attributes:
      path: its file, or its folder.
      network: what its tensors are for.
      extra: tensors that it has and the network does not: unused ones and copies.
    """

    path: Path
    network: Network
    extra: tuple[str, ...]


def import_model(
    source: Path, text_encoder: Path, out: Path, sizes: Mapping[str, Any] | None = None
) -> None:
    """Read a published model into a model folder.

    Everything is checked before anything is written, but for values that are not finite. Tensors
    keep their type and go from file to file one at a time.

    Args:
      source: the published folder.
      text_encoder: the OLMo folder.
      out: the model folder to make.
      sizes: what shapes do not tell, under "bae", "generator" and "text", by the reference's
        names; other keys are not looked at. Published values where absent.

    Raises:
      UserError: a file is missing, damaged or does not fit, or `out` is there already.
    """
    parts, description = inspect(source, text_encoder, sizes or {})
    with fresh_folder(out) as folder:
        for name, part in parts.items():
            print(f"{name}: {part.path}", flush=True)
            with open_any(part.path) as tensors:
                _write_part(folder, name, part, tensors)
        for name, content in tokenizer_files(text_encoder).items():
            (folder / name).write_bytes(content)
        write_json(folder / "config.json", description)


def inspect(
    source: Path, text_encoder: Path, sizes: Mapping[str, Any]
) -> tuple[dict[str, Part], dict[str, Any]]:
    """Look at the files of a published model without reading their data.

    Returns:
      Its parts by the names that they have in a model folder, and that folder's `config.json`.

    Raises:
      UserError: see `import_model`.
    """
    if not source.is_dir():
        raise UserError(f"{source} is no folder: expected one with {TOKENIZER_FILE}")
    found: dict[str, Path] = {}
    for kind, file in GENERATOR_FILES.items():
        paths = [source / file, (source / file).with_suffix(".safetensors")]
        found.update((kind, path) for path in reversed(paths) if path.exists())
    if not found:
        files = " and ".join(GENERATOR_FILES.values())
        raise UserError(f"{source} has no generator: expected one or both of {files}")
    language = read_json_file(text_encoder / "config.json")
    olmo = reference_sizes.measure_olmo(
        language, sizes.get("text", {}), str(text_encoder / "config.json")
    )
    pad_id = _pad_id(text_encoder, olmo.vocab_size)
    path = source / TOKENIZER_FILE
    with open_any(path) as tensors:
        config = reference_sizes.measure_tokenizer(tensors.shapes, sizes.get("bae", {}), str(path))
        parts = {"tokenizer": _account(path, TokenizerNetwork(config), tensors)}
    wanted = {
        "num_tokens": config.num_tokens,
        "bits": config.bits,
        "num_layers": olmo.num_hidden_layers,
        "text_width": olmo.hidden_size,
    }
    generators: dict[str, dict[str, Any]] = {}
    for kind, path in found.items():
        with open_any(path) as tensors:
            generator = reference_sizes.measure_generator(
                tensors.shapes, kind, sizes.get("generator", {}), wanted, str(path)
            )
            network = model_parts.GENERATORS[kind](**generator)
            parts[kind] = _account(path, network, tensors)
        for key, value in wanted.items():
            if generator[key] != value:
                other = str(text_encoder)
                if key in ("num_tokens", "bits"):
                    told_by = "encoder.latent_tokens" if key == "num_tokens" else "quantizer.embed"
                    other = f"tensor {told_by!r} of {source / TOKENIZER_FILE}"
                raise UserError(
                    f"{path} has {key} {generator[key]}, {other} {value}; expected parts of one "
                    "model"
                )
        del generator["text_width"]
        generators[kind] = {"kind": kind, **generator}
    with open_any(text_encoder) as tensors:
        # Before anything that takes so many steps.
        if olmo.num_hidden_layers > len(tensors):
            raise UserError(
                f"{text_encoder} has {len(tensors)} tensors, its config.json "
                f"{olmo.num_hidden_layers} layers"
            )
        parts["text"] = _account(text_encoder, Olmo(olmo), tensors)
    text = {**dataclasses.asdict(olmo), "max_length": MAX_LENGTH, "pad_token_id": pad_id}
    return parts, {
        "tokenizer": dataclasses.asdict(config),
        **generators,
        "text": text,
        "target": "epsilon",
        "image_size": PATCHES * config.patch_size,
        # What an export needs beside the weights to give back what came in.
        "published": {
            "text_config": language,
            "extra": {name: list(part.extra) for name, part in parts.items()},
        },
    }


def _account(path: Path, network: Network, tensors: Tensors) -> Part:
    convert.account(network, tensors.shapes, str(path))
    known = {*reference_names.unused_shapes(network), *reference_names.copies(network)}
    return Part(path, network, tuple(sorted(known & tensors.specs.keys())))


def _pad_id(folder: Path, vocab_size: int) -> int:
    """Return the pad id of a text tokenizer, whose ids the embedding must hold."""
    tokenizer = TextTokenizer.from_folder(folder)
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"the text tokenizer of {folder} has {tokenizer.vocab_size} tokens, its config.json a "
            f"vocab_size of {vocab_size}"
        )
    return tokenizer.pad_id


def _write_part(folder: Path, name: str, part: Part, tensors: Tensors) -> None:
    shapes = convert.shapes_by_path(part.network)
    specs: dict[str, Spec] = {
        path: (tuple(shapes[path].shape), tensors.specs[group[0].name][1])
        for path, group in convert.by_path(part.network).items()
    }

    def pieces() -> Iterator[tuple[str, np.ndarray]]:
        for entry, piece in convert.stream(part.network, tensors, str(part.path)):
            yield entry.path, piece

    write_safetensors(folder / f"{name}.safetensors", specs, pieces())
    unused = reference_names.unused_shapes(part.network).keys() & set(part.extra)
    if unused:
        write_safetensors(
            model_folder.unused_file(folder, name),
            {key: tensors.specs[key] for key in sorted(unused)},
            ((key, tensors[key]) for key in sorted(unused)),
        )


@contextlib.contextmanager
def open_any(path: Path) -> Iterator[Tensors]:
    """Open a torch file (.pt), a safetensors file, or the folder of a language model."""
    if path.suffix == ".pt":
        with open_torch(path) as tensors:
            yield tensors
    elif path.suffix == ".safetensors":
        with open_safetensors(path) as tensors:
            yield tensors
    else:
        with open_model(path) as tensors:
            yield tensors
