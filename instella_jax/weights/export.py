"""A model folder -> the published layout, orbax checkpoints, or safetensors."""

import dataclasses
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from instella_jax.errors import UserError
from instella_jax.models.functional import Network
from instella_jax.models.layers import Execution
from instella_jax.models.text import tokenizer_files
from instella_jax.runtime.files import fresh_folder, write_json
from instella_jax.weights import convert, model_folder, model_parts, published, reference_names
from instella_jax.weights.tensor_files import Tensors, open_safetensors, write_safetensors

FORMS = ("reference", "orbax", "safetensors")


@dataclasses.dataclass(frozen=True)
class _Stored:
    """A parameter in a file, read whole or layer by layer."""

    tensors: Tensors
    name: str

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensors.specs[self.name][0]

    def __getitem__(self, layer: int) -> np.ndarray:
        return self.tensors.read_layer(self.name, layer)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """Read everything."""
        del copy
        return np.asarray(self.tensors[self.name], dtype)


def export_model(source: Path, form: str, out: Path) -> None:
    """Write what a model folder holds in another form.

    "orbax" and "safetensors" are model folders themselves, their weights stored the one or the
    other way: `init_from` and the other config keys take both.

    Args:
      source: a model folder.
      form: one of `FORMS`.
      out: the folder to make.

    Raises:
      UserError: the model folder is damaged, has no published form, or `out` is there already.
    """
    description = model_folder.read_description(source)
    parts = [part for part in model_folder.PARTS if model_folder.has_weights(source, part)]
    if not parts:
        raise UserError(
            f"model folder {source} has no weights: expected one of {model_folder.PARTS}"
        )
    networks = {
        part: model_parts.make_network(source, description, part, Execution()) for part in parts
    }
    with fresh_folder(out) as folder:
        for part, network in networks.items():
            print(f"{part} of {source}", flush=True)
            with model_folder.open_part(source, part, network) as tensors:
                if form == "reference":
                    _write_reference(folder, source, description, part, network, tensors)
                elif form == "orbax":
                    from instella_jax.checkpoints.params import save_params

                    save_params(folder / part, convert.nested(tensors))
                else:
                    write_safetensors(
                        folder / f"{part}.safetensors", tensors.specs, tensors.items()
                    )
        if form == "reference":
            return
        shutil.copyfile(source / "config.json", folder / "config.json")
        _copy_tokenizer(source, folder)
        for path in [model_folder.unused_file(source, part) for part in parts]:
            if path.exists():
                shutil.copyfile(path, folder / path.name)


def _write_reference(
    folder: Path,
    source: Path,
    description: Mapping[str, Any],
    part: str,
    network: Network,
    tensors: Tensors,
) -> None:
    """Write a part with its published names, in its place of the published layout."""
    origin = description.get("published", {})
    # A model that was not imported gets every tensor that the reference expects.
    extra = origin.get("extra", {}).get(part)
    known = {*reference_names.unused_shapes(network), *reference_names.copies(network)}
    left_out = known - set(known if extra is None else extra)

    def pieces() -> Iterator[tuple[str, np.ndarray]]:
        stored = {name: _Stored(tensors, name) for name in tensors}
        unused = model_folder.unused_file(source, part)
        kept: dict[str, np.ndarray] = {}
        if unused.exists():
            with open_safetensors(unused) as old:
                kept = dict(old)
        for name, value in convert.from_params(network, convert.nested(stored), kept):
            if name not in left_out:
                yield name, value

    if part == "tokenizer":
        if description["tokenizer"].get("latent_grid"):
            raise UserError(
                f"the tokenizer of {source} places its latent tokens on a grid, which the "
                "published system does not know; --to orbax and safetensors can hold it"
            )
        path = folder / published.TOKENIZER_FILE
    elif part == "text":
        path = folder / published.TEXT_FOLDER / "model.safetensors"
    else:
        from instella_jax.weights.torch_files import write_torch

        kind = description[part]["kind"]
        write_torch(folder / published.GENERATOR_FILES[kind], pieces())
        return
    path.parent.mkdir()
    first = {entry.name: entry for entry in reference_names.entries(network)}
    shapes = convert.reference_shapes(network)
    for copy, original in reference_names.copies(network).items():
        first[copy], shapes[copy] = first[original], shapes[original]
    specs = {
        name: (shapes[name], tensors.specs[entry.path][1])
        for name, entry in first.items()
        if name not in left_out
    }
    write_safetensors(path, specs, pieces())
    if part == "text":
        config = origin.get("text_config") or _olmo_json(description["text"])
        write_json(path.parent / "config.json", config)
        _copy_tokenizer(source, path.parent)


def _copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy the files of a model folder's text tokenizer, where it has one."""
    if (source / "tokenizer.json").exists():
        for name, content in tokenizer_files(source).items():
            (folder / name).write_bytes(content)


def _olmo_json(text: Mapping[str, Any]) -> dict[str, Any]:
    """Return the `config.json` of an OLMo with these sizes."""
    sizes = {key: value for key, value in text.items() if key != "max_length"}
    return {"model_type": "olmo", "tie_word_embeddings": True, **sizes}
