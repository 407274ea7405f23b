"""`InstellaPipeline` with the shipped weights, and the kinds of models that it opens."""

import json
import logging
import re
import shutil
import sys

import huggingface_hub
import jax.numpy as jnp
import numpy as np
import pytest
from huggingface_hub import constants
from safetensors import safe_open

import instella_jax
from instella_jax import InstellaPipeline, cli
from instella_jax.runtime.digest import digest
from instella_jax.sampling.options import Options
from instella_jax.sampling.records import read_record
from instella_jax.sampling.sampler import Sampler
from instella_jax.weights.model_folder import ASSETS
from tools import make_random_published

PROMPTS = ["a cat above a blue square", "two dogs on a red background"]
QUICK = dict(num_inference_steps=4)


@pytest.fixture(scope="module")
def saved(pipes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "model"
    pipes["demo"].save_pretrained(folder, {"objects_right": 0.96875, "prompts": 64})
    return folder


def test_it_gives_what_the_sampler_gives_for_the_published_guidance(pipe):
    shipped = "demo_diffusion" if pipe.kind == "diffusion" else "demo_ar"
    sampler = Sampler.from_folder(
        ASSETS / shipped, ASSETS / "demo_tokenizer", text_encoder=ASSETS / "demo_text"
    )
    options = Options(guidance=2.5, steps=4, temperature=0.7, seed=3)
    wanted = sampler(PROMPTS, options)
    output = pipe(PROMPTS, guidance_scale=3.5, temperature=0.7, seed=3, **QUICK)
    np.testing.assert_array_equal(np.stack([np.asarray(i) for i in output.images]), wanted)
    floats = pipe(
        PROMPTS, guidance_scale=3.5, temperature=0.7, seed=3, output_type="np", **QUICK
    ).images
    assert floats.dtype == np.float32 and 0 <= floats.min() < floats.max() <= 1
    np.testing.assert_array_equal(np.round(floats * 255), wanted)


def test_what_a_call_leaves_out_is_the_models_own(pipe):
    scale, temperature = (2.0, 1.0) if pipe.kind == "diffusion" else (2.0, 0.5)
    assert (pipe.guidance_scale, pipe.temperature) == (scale, temperature)
    given = pipe(PROMPTS, guidance_scale=scale, temperature=temperature, output_type="codes")
    left = pipe(PROMPTS, output_type="codes")
    assert left.images is None and left.codes.shape == (2, 16, 32) and left.codes.dtype == bool
    np.testing.assert_array_equal(left.codes, given.codes)


def test_the_tokenizer_decodes_and_encodes_the_codes(pipe):
    output = pipe(PROMPTS, **QUICK)
    pictures = np.stack([np.asarray(image) for image in output.images])
    np.testing.assert_array_equal(pipe.tokenizer.decode(output.codes, 64, 64), pictures)
    assert (pipe.tokenizer.encode(pictures) == output.codes).mean() > 0.7


def test_seeds_are_of_pictures_or_of_prompts(pipe):
    def codes(**given):
        output = pipe(PROMPTS, num_images_per_prompt=2, output_type="codes", **given, **QUICK)
        return output.codes, output.seeds

    whole, seeds = codes(seed=[5, 6, 5, 6])
    assert seeds == [5, 6, 5, 6]
    for seed in (5, [5, 5]):
        again, same = codes(seed=seed)
        assert same == seeds
        np.testing.assert_array_equal(again, whole)
    swapped, _ = codes(seed=[6, 5, 5, 6])
    np.testing.assert_array_equal(swapped[[1, 0, 2, 3]], whole)


def test_each_prompt_may_have_its_own_negative_prompt(pipe):
    both = pipe(PROMPTS, ["a dog", ""], output_type="codes", **QUICK).codes
    for number, negative in enumerate(("a dog", None)):
        one = pipe([PROMPTS[number]] * 2, negative, output_type="codes", **QUICK, seed=[0, 0])
        np.testing.assert_array_equal(one.codes[0], both[number])
    assert (both[0] != pipe(PROMPTS, output_type="codes", **QUICK).codes[0]).any()


def test_a_callback_sees_every_step_and_changes_no_bit(pipe):
    seen = []

    def watch(owner, step, total, values):
        assert owner is pipe
        seen.append((step, total, values["first"], values["seeds"], values["codes"]))

    prompts = [*PROMPTS, PROMPTS[0]]
    plain = pipe(prompts, seed=[1, 2, 3], batch_size=2, **QUICK)
    watched = pipe(prompts, seed=[1, 2, 3], batch_size=2, callback_on_step_end=watch, **QUICK)
    np.testing.assert_array_equal(plain.codes, watched.codes)
    assert [np.array_equal(a, b) for a, b in zip(plain.images, watched.images, strict=True)] == [
        True
    ] * 3
    steps = 4 if pipe.kind == "diffusion" else 16
    assert [s[:3] for s in seen] == [(i, steps, first) for first in (0, 2) for i in range(steps)]
    assert seen[0][3] == [1, 2] and seen[-1][3] == [3]
    np.testing.assert_array_equal(seen[steps - 1][4], plain.codes[:2])
    np.testing.assert_array_equal(seen[-1][4], plain.codes[2:])


def test_a_new_shape_is_said_to_be_compiled_once(pipes, caplog):
    pipe = InstellaPipeline.from_pretrained("demo")
    with caplog.at_level(logging.WARNING):
        for seed in (1, 2):
            pipe(PROMPTS, seed=seed, guidance_scale=seed, output_type="codes", **QUICK)
    assert [r.getMessage() for r in caplog.records if "compiling" in r.getMessage()] == [
        "compiling, once for this shape: 2 picture(s) of 64x64"
    ]


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (dict(prompt=[]), "there is no prompt"),
        (dict(prompt=["a cat", 3]), "prompt 3 is a int: expected a text"),
        (dict(negative_prompt=["a", "b"]), "there are 2 negative prompts for 1 prompts: give one"),
        (dict(guidance_scale=-1.0), "guidance_scale is -1.0: expected a number from 0 to 1001"),
        (dict(guidance_scale="x"), "guidance_scale is 'x': expected a number"),
        (dict(num_inference_steps=0), "num_inference_steps is 0: expected a whole number of at"),
        (dict(num_images_per_prompt=0), "num_images_per_prompt is 0: expected a whole number"),
        (dict(height=60), "image size 60x64 does not fit"),
        (dict(height=0), "height is 0: expected at least 1 pixel"),
        (dict(temperature=-1.0), "temperature is -1.0: expected"),
        (dict(protocol=3), "protocol is 3: expected"),
        (dict(seed=-1), "seed is -1: expected a whole number from 0 to 4294967295"),
        (dict(seed=[1, 2]), "there are 2 seeds for 1 prompts with 1 picture"),
        (dict(output_type="jpg"), "output_type is 'jpg': expected one of"),
    ],
)
def test_a_mistake_is_a_value_error_of_one_sentence(pipes, given, sentence):
    with pytest.raises(ValueError, match="^" + re.escape(sentence)) as error:
        pipes["demo"](**{"prompt": "a cat", **given})
    assert "\n" not in str(error.value)


def test_a_saved_model_gives_the_same_pictures(pipes, saved):
    index = json.loads((saved / "model_index.json").read_text())
    assert index["_class_name"] == "InstellaPipeline"
    assert index["_instella_jax_version"] == instella_jax.__version__
    components = ("generator", "text_encoder", "tokenizer", "text_tokenizer")
    assert all((saved / name / "config.json").is_file() and name in index for name in components)
    pipe = InstellaPipeline.from_pretrained(saved)
    assert (pipe.guidance_scale, pipe.temperature) == (2.0, 1.0)
    wanted = pipes["demo"](PROMPTS, **QUICK)
    found = pipe(PROMPTS, **QUICK)
    np.testing.assert_array_equal(found.codes, wanted.codes)
    assert all(np.array_equal(a, b) for a, b in zip(found.images, wanted.images, strict=True))
    with pytest.raises(ValueError, match="is there already"):
        pipe.save_pretrained(saved)


def test_a_folder_says_how_times_are_spread(pipes, saved, tmp_path, monkeypatch):
    """A model's own exponent of times is used where a call, a command or a saved copy has none."""
    other = shutil.copytree(saved, tmp_path / "other")
    path = other / "generator" / "config.json"
    description = json.loads(path.read_text())
    assert description["sampling"]["rho"] == 1.0
    assert "temperature 1 and rho 1." in (saved / "README.md").read_text()
    description["sampling"]["rho"] = 0.4
    path.write_text(json.dumps(description))
    pipe = InstellaPipeline.from_pretrained(other)
    found = pipe(PROMPTS, output_type="codes", **QUICK).codes
    given = pipes["demo"](PROMPTS, output_type="codes", rho=0.4, **QUICK).codes
    plain = pipes["demo"](PROMPTS, output_type="codes", **QUICK).codes
    np.testing.assert_array_equal(found, given)
    assert (found != plain).any()
    pipe.save_pretrained(tmp_path / "again")
    assert InstellaPipeline.from_pretrained(tmp_path / "again").rho == 0.4
    arguments = ["generate", PROMPTS[0], f"--model={other}", "--steps=4", f"--out={tmp_path}/drawn"]
    monkeypatch.setattr(sys, "argv", ["instella-jax", *arguments])
    cli.main()
    (picture,) = (tmp_path / "drawn").glob("0*.png")
    assert read_record(picture)["rho"] == 0.4


def test_the_card_says_sizes_and_results(pipes, saved):
    card = (saved / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: instella-jax\n")
    assert "64 x 64 pixels" in card and "16 latent tokens of 32\nbits (64 bytes" in card
    assert "| objects right | 0.9688 |" in card and "| prompts | 64 |" in card
    with safe_open(saved / "generator/generator.safetensors", framework="numpy") as file:
        count = sum(file.get_tensor(name).size for name in file.keys())  # noqa: SIM118
    assert f"{count:,}" in card


def test_parts_can_come_from_elsewhere(pipes, saved, tmp_path):
    alone = shutil.copytree(saved / "generator", tmp_path / "alone")
    with pytest.raises(ValueError, match="has no tokenizer of images: give tokenizer=FOLDER"):
        InstellaPipeline.from_pretrained(alone)
    with pytest.raises(ValueError, match="has no text encoder: give text_encoder=FOLDER"):
        InstellaPipeline.from_pretrained(alone, tokenizer=saved / "tokenizer")
    pipe = InstellaPipeline.from_pretrained(
        alone, tokenizer=saved / "tokenizer", text_encoder=ASSETS / "demo_text"
    )
    wanted = pipes["demo"](PROMPTS, output_type="codes", **QUICK)
    np.testing.assert_array_equal(pipe(PROMPTS, output_type="codes", **QUICK).codes, wanted.codes)


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """An empty cache of the hub, and no network."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def test_an_id_is_opened_from_the_cache_without_a_network(pipes, saved, offline):
    with pytest.raises(ValueError, match="^someone/demo is neither a folder nor in the cache"):
        InstellaPipeline.from_pretrained("someone/demo")
    repository = offline / "models--someone--demo"
    shutil.copytree(saved, repository / "snapshots" / ("a" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    pipe = InstellaPipeline.from_pretrained("someone/demo")
    wanted = pipes["demo"](PROMPTS, output_type="codes", **QUICK)
    np.testing.assert_array_equal(pipe(PROMPTS, output_type="codes", **QUICK).codes, wanted.codes)


@pytest.mark.slow
def test_a_published_repository_is_imported_once(offline, tmp_path, monkeypatch):
    made = tmp_path / "made"
    make_random_published.make(made, "tiny", jnp.float32, torch=False)
    shutil.copyfile(made / "sizes.json", made / "model" / "sizes.json")
    monkeypatch.setenv("INSTELLA_JAX_MODELS", str(tmp_path / "imported"))
    with pytest.raises(ValueError, match="comes without its text encoder: give text_encoder="):
        InstellaPipeline.from_pretrained(made / "model")
    opened = [
        InstellaPipeline.from_pretrained(made / "model", text_encoder=made / "olmo", kind=kind)
        for kind in (None, "ar")
    ]
    (folder,) = (tmp_path / "imported").iterdir()
    assert {pipe.weights.paths["text"].parent for pipe in opened} == {folder}
    assert [(p.kind, p.guidance_scale, p.temperature) for p in opened] == [
        ("diffusion", 8.5, 1.0),
        ("ar", 10.0, 0.5),
    ]


def test_names_of_no_model_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    for name, sentence in (("nowhere", "there is no model"), (tmp_path / "empty", "is no model")):
        with pytest.raises(ValueError, match=sentence):
            InstellaPipeline.from_pretrained(name)


def test_what_is_pushed_is_the_saved_folder(pipes, saved, monkeypatch):
    calls = []

    class Api:
        def create_repo(self, repository, **options):
            calls.append((repository, options))

        def upload_folder(self, *, repo_id, folder_path):
            calls.append((repo_id, {p.relative_to(folder_path) for p in folder_path.rglob("*")}))
            return "https://hub/commit"

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    with pytest.raises(ValueError, match="is no id of a repository: expected owner/name"):
        pipes["demo"].push_to_hub("demo")
    assert pipes["demo"].push_to_hub("me/demo", private=True) == "https://hub/commit"
    assert calls == [
        ("me/demo", dict(private=True, exist_ok=True)),
        ("me/demo", {path.relative_to(saved) for path in saved.rglob("*")}),
    ]


def test_the_tokenizers_files_name_its_own_weights(pipe):
    assert pipe.tokenizer.fingerprint == digest(ASSETS / "demo_tokenizer/tokenizer.safetensors")


def test_the_demo_takes_another_tokenizer_where_one_is_given(tmp_path):
    shutil.copytree(ASSETS / "demo_tokenizer", tmp_path / "mine")
    pipe = InstellaPipeline.from_pretrained("demo", tokenizer=tmp_path / "mine")
    assert pipe.weights.paths["tokenizer"].parent == tmp_path / "mine"
