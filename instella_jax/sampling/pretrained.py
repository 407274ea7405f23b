"""What `from_pretrained` takes: the shipped demo, folders of several kinds, the hub's repositories.

A folder in the manner of the hub has `model_index.json`, a folder for each component, `generator`,
`text_encoder`, `tokenizer` (of images) and `text_tokenizer`, and a `README.md`. Each component is a
model folder of its own (see `weights.model_folder`), which the configs take as well.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from instella_jax import stored_config
from instella_jax.errors import UserError
from instella_jax.models import lora
from instella_jax.models.layers import Execution
from instella_jax.runtime.files import fresh_folder, write_bytes, write_json
from instella_jax.sampling.card import model_card, version
from instella_jax.sampling.load import Weights, load_sampler, open_folders
from instella_jax.sampling.sampler import Sampler
from instella_jax.weights import hub, model_folder, model_parts, published
from instella_jax.weights.tensor_files import read_json_file

INDEX = "model_index.json"
DEMOS = {"demo": "demo_diffusion", "demo_ar": "demo_ar"}
# How the published systems sample, for folders that do not say.
PUBLISHED = {
    "diffusion": {"guidance": 7.5, "temperature": 1.0, "rho": 1.0},
    "ar": {"guidance": 9.0, "temperature": 0.5},
}


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A sampler, and what is known of it.

    Attributes:
      sampler: the sampler.
      weights: which weights it has.
      sampling: the model's own guidance (g) and temperature, and rho of a diffusion sampler.
      results: measured figures by name, for its card.
    """

    sampler: Sampler
    weights: Weights
    sampling: dict[str, float]
    results: dict[str, Any]


def open_model(
    name: str,
    *,
    tokenizer: str | None = None,
    text_encoder: str | None = None,
    kind: str | None = None,
    run: Execution = Execution(),  # noqa: B008 (frozen)
    revision: str | None = None,
) -> Pretrained:
    """Open a model by its name.

    Args:
      name: "demo" or "demo_ar", the shipped ones; a folder: of the hub's manner, a model folder,
        the workdir of a run, or a published model, which is imported once; or a repository of the
        hub, "owner/name".
      tokenizer: of images; a folder or a repository, for models that come without.
      text_encoder: likewise.
      kind: "diffusion" or "ar", where a folder holds both; None for any.
      run: how the networks are computed.
      revision: of the repository.

    Raises:
      UserError: there is no such model, or a part of it is missing or damaged.
    """
    given = {
        key: _folder(value)
        for key, value in (("tokenizer", tokenizer), ("text_encoder", text_encoder))
        if value is not None
    }
    opened = _open_named(name, given, kind, run, revision)
    # As it was named: the name goes into pictures, where no path of this machine belongs.
    return dataclasses.replace(opened, weights=dataclasses.replace(opened.weights, folder=name))


def _open_named(
    name: str,
    given: Mapping[str, Path],
    kind: str | None,
    run: Execution,
    revision: str | None,
) -> Pretrained:
    if name in DEMOS and not Path(name).exists():
        folder = model_folder.ASSETS / DEMOS[name]
        shipped = {
            "tokenizer": model_folder.ASSETS / "demo_tokenizer",
            "text_encoder": model_folder.ASSETS / "demo_text",
        }
        return _open(folder, {**shipped, **given}, kind, run)
    folder = _folder(name, revision)
    if (folder / INDEX).is_file():
        components = {key: folder / key for key in ("tokenizer", "text_encoder", "text_tokenizer")}
        if given.get("text_encoder"):
            del components["text_tokenizer"]
        return _open(folder / "generator", {**components, **given}, kind, run)
    if (folder / published.TOKENIZER_FILE).exists():
        return _open(_imported(folder, given.get("text_encoder")), {}, kind, run)
    config = _config(folder)
    if "stage" in config:
        return _open_run(folder, config, run)
    if config:
        return _open(folder, {**_beside(folder), **given}, kind, run)
    raise UserError(
        f"{folder} is no model: expected {INDEX}, config.json, or {published.TOKENIZER_FILE}"
    )


def _folder(name: str, revision: str | None = None) -> Path:
    """Return the folder that a name means."""
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if hub.is_id(name) and not name.startswith((".", "~")):
        return hub.fetch(name, revision)
    demos = " or ".join(DEMOS)
    raise UserError(f"there is no model {name!r}: expected {demos}, a folder, or an id owner/name")


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    return read_json_file(path) if path.is_file() else {}


def _open(folder: Path, others: Mapping[str, Path], kind: str | None, run: Execution) -> Pretrained:
    description = model_folder.read_description(folder)
    whole = "tokenizer" in description
    if not whole and "tokenizer" not in others:
        raise UserError(f"{folder} has no tokenizer of images: give tokenizer=FOLDER")
    if not model_folder.has_weights(folder, "text") and "text_encoder" not in others:
        raise UserError(f"{folder} has no text encoder: give text_encoder=FOLDER")
    sampler, weights = open_folders(
        folder,
        None if whole else others["tokenizer"],
        others.get("text_encoder"),
        others.get("text_tokenizer"),
        kind=kind,
        run=run,
    )
    part = model_parts.find_generator(folder, description, kind)
    sampling = {**PUBLISHED[description[part]["kind"]], **description.get("sampling", {})}
    return Pretrained(sampler, weights, sampling, description.get("results", {}))


def _open_run(workdir: Path, config: dict[str, Any], run: Execution) -> Pretrained:
    own = stored_config.from_json(config, workdir / "config.json")
    stored_config.complete(own)
    own.run.update(dtype=run.dtype, param_dtype=run.param_dtype)
    own.mesh.update(dcn_data=1, data=-1, fsdp=1, tensor=1)
    sampler, weights = load_sampler(own, workdir)
    sampling = {name: own.sample[name] for name in PUBLISHED[own.stage]}
    return Pretrained(sampler, weights, sampling, {})


def _beside(folder: Path) -> dict[str, Path]:
    """Return the folders that the run of a model, which lies in its workdir, has trained on."""
    run = _config(folder.absolute().parent)
    if "stage" not in run:
        return {}
    found = {}
    for key, value in (
        ("tokenizer", run.get("tokenizer")),
        ("text_encoder", run["text"]["encoder"]),
    ):
        if value:
            what = "text.encoder" if key == "text_encoder" else key
            found[key] = model_folder.find(value, what)
    return found


def _imported(source: Path, text_encoder: Path | None) -> Path:
    """Return the model folder of a published model, imported unless it was before."""
    own = source / published.TEXT_FOLDER
    text_encoder = text_encoder or (own if own.is_dir() else None)
    if text_encoder is None:
        raise UserError(
            f"{source} is a published model, which comes without its text encoder: give "
            "text_encoder=FOLDER of the OLMo, or its id"
        )
    out = hub.import_folder(source, text_encoder)
    if not out.exists():
        # What shapes do not tell, where it is not as published.
        sizes = source / "sizes.json"
        given = read_json_file(sizes) if sizes.is_file() else None
        published.import_model(source, text_encoder, out, given)
    return out


def save_model(model: Pretrained, folder: Path) -> None:
    """Write a folder in the manner of the hub, adapters being part of its kernels.

    Raises:
      UserError: it is there already, or cannot be written.
    """
    sampler = model.sampler
    generator, text = sampler.describe_parts()
    tokenizer = {
        "tokenizer": dataclasses.asdict(sampler.tokenizer.config),
        "image_size": sampler.image_size,
    }
    generator = {**generator, "sampling": model.sampling}
    if model.results:
        generator["results"] = model.results
    with fresh_folder(folder) as scratch:
        for name, part, description in (
            ("generator", "generator", generator),
            ("text_encoder", "text", text),
            ("tokenizer", "tokenizer", tokenizer),
        ):
            params = lora.merge(sampler.params[part])
            model_folder.save(scratch / name, description, {part: params})
        sampler.text_tokenizer.save(scratch / "text_tokenizer")
        index = {
            "_class_name": "InstellaPipeline",
            "_instella_jax_version": version(),
            "generator": ["instella_jax", type(sampler.generator).__name__],
            "text_encoder": ["instella_jax", type(sampler.text).__name__],
            "tokenizer": ["instella_jax", type(sampler.tokenizer).__name__],
            "text_tokenizer": ["tokenizers", "Tokenizer"],
        }
        write_json(scratch / INDEX, index)
        write_bytes(scratch / "README.md", model_card(sampler, generator).encode())
