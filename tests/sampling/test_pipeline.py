import dataclasses
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from instella_jax.errors import UserError
from instella_jax.runtime import sharding
from instella_jax.sampling import loops
from instella_jax.sampling import pipeline as pipeline_module
from instella_jax.sampling.pipeline import InstellaPipeline, Options
from instella_jax.stages import make_stage
from instella_jax.stages.base import init_stage
from instella_jax.weights import model_folder

PROMPTS = [
    "a cat on a red background",
    "two dogs",
    "a red heart below a pizza on a blue background",
]
OPTIONS = Options(steps=3, guidance=2.0, batch_size=4)


@pytest.fixture(params=["diffusion", "ar"])
def folder(request, tiny_diffusion_config, tiny_ar_config, tiny_tokenizer_folder, tmp_path):
    """A model folder of a tiny generator with random weights, and its tokenizer's."""
    config = {"diffusion": tiny_diffusion_config, "ar": tiny_ar_config}[request.param]
    stage = make_stage(config)
    params = sharding.values(jax.jit(lambda key: init_stage(stage, key))(jax.random.key(1)))
    # Far from the initial values, where hardly anything depends on the prompt.
    params = jax.tree.map(
        lambda x: x + 0.4 * jax.random.normal(jax.random.key(x.size), x.shape), params
    )
    model_folder.save(tmp_path, stage.describe(), params, text_folder=stage.text_folder)
    return tmp_path, tiny_tokenizer_folder


@pytest.fixture
def pipeline(folder):
    return InstellaPipeline.from_folder(*folder)


def test_pictures_are_of_the_prompts_in_order(pipeline):
    drawn = pipeline(PROMPTS, dataclasses.replace(OPTIONS, images_per_prompt=2))
    assert drawn.shape == (6, 32, 32, 3) and drawn.dtype == np.uint8
    assert len({picture.tobytes() for picture in drawn}) == 6


def test_a_picture_depends_on_prompt_and_seed_alone(pipeline):
    together = pipeline(PROMPTS, dataclasses.replace(OPTIONS, images_per_prompt=2, seed=5))
    for index, prompt in enumerate(PROMPTS):
        for picture in range(2):
            alone = pipeline([prompt], dataclasses.replace(OPTIONS, seed=5 + picture))
            np.testing.assert_array_equal(alone[0], together[2 * index + picture])


def test_one_text_is_one_prompt(pipeline):
    np.testing.assert_array_equal(pipeline(PROMPTS[0], OPTIONS), pipeline(PROMPTS[:1], OPTIONS))


def test_the_bits_of_a_code_are_the_same_alone_and_in_a_batch(pipeline, monkeypatch):
    codes, sample = [], pipeline.codes

    def watched(*args):
        codes.append(np.asarray(sample(*args)))
        return codes[-1]

    monkeypatch.setattr(pipeline, "codes", watched)
    prompts = [f"{number} {prompt}" for prompt in PROMPTS for number in ("a", "two", "three")][:8]
    pipeline(prompts, dataclasses.replace(OPTIONS, batch_size=8))
    for prompt in prompts:
        pipeline(prompt, dataclasses.replace(OPTIONS, batch_size=8))
    together, *alone = codes
    assert together.shape[0] == 8 and 0.2 < together.mean() < 0.8
    np.testing.assert_array_equal(np.concatenate(alone), together)


def test_a_negative_prompt_without_guidance_is_said_to_do_nothing(pipeline, caplog):
    options = dataclasses.replace(OPTIONS, negative_prompt=PROMPTS[1])
    pipeline(PROMPTS[0], options)
    assert "does nothing" not in caplog.text
    pipeline(PROMPTS[0], dataclasses.replace(options, guidance=0.0))
    assert "the negative prompt does nothing with guidance 0" in caplog.text


def test_batches_give_what_one_batch_gives(pipeline):
    whole = pipeline(PROMPTS, dataclasses.replace(OPTIONS, batch_size=8))
    for size in (1, 2):
        parts = list(pipeline.batches(PROMPTS, dataclasses.replace(OPTIONS, batch_size=size)))
        assert [len(part) for part in parts] == {1: [1, 1, 1], 2: [2, 1]}[size]
        np.testing.assert_array_equal(np.concatenate(parts), whole)


def test_settings_change_without_compiling(pipeline):
    pipeline(PROMPTS[:1], OPTIONS)
    before = loops.sample_diffusion._cache_size(), loops.sample_ar._cache_size()
    pipeline(PROMPTS[:1], dataclasses.replace(OPTIONS, steps=7, guidance=0.5, temperature=0.3))
    pipeline(PROMPTS[1:2], dataclasses.replace(OPTIONS, rho=2.0, seed=9))
    assert before == (loops.sample_diffusion._cache_size(), loops.sample_ar._cache_size())


def test_repeated_prompts_are_encoded_once(pipeline, monkeypatch):
    rows = []
    encode = pipeline_module.text_features
    monkeypatch.setattr(
        pipeline_module,
        "text_features",
        lambda network, params, ids, mask: (
            rows.append(len(ids)) or encode(network, params, ids, mask)
        ),
    )
    options = dataclasses.replace(OPTIONS, batch_size=6)
    pipeline([PROMPTS[0]] * 5 + [PROMPTS[1]], options)
    assert rows == [1, 2]  # the empty prompt, once ever, and two others
    pipeline([PROMPTS[1], "", PROMPTS[1]], options)
    pipeline(PROMPTS[:1], dataclasses.replace(options, negative_prompt=PROMPTS[2]))
    assert rows == [1, 2, 1, 2]


def test_prompts_are_tokenised_once(pipeline, monkeypatch):
    texts, encode = [], pipeline.text_tokenizer.encode

    def watched(prompts, **options):
        texts.extend(prompts)
        return encode(prompts, **options)

    monkeypatch.setattr(pipeline.text_tokenizer, "encode", watched)
    pipeline([*PROMPTS, PROMPTS[0]], dataclasses.replace(OPTIONS, batch_size=2))
    assert sorted(texts) == sorted([*PROMPTS, "", ""])  # "" as a prompt, and for its features


def test_the_empty_prompt_is_what_the_encoder_makes_of_it(pipeline):
    texts = ["", PROMPTS[0]]
    tokens = pipeline.tokenise(texts)
    length = len(tokens[""][1])
    ids, mask = pipeline.text_tokenizer.encode(texts, pad_to=length)
    whole = pipeline_module.text_features(pipeline.text, pipeline.params["text"], ids, mask)
    features, seen = pipeline.describe(texts, tokens)
    np.testing.assert_array_equal(seen, mask)
    # Another number of rows is another order of sums, which shows in what is near 0 among numbers
    # of 6 on average.
    largest = np.abs(whole[:, mask]).max()
    np.testing.assert_allclose(features[:, seen], whole[:, mask], rtol=0, atol=1e-6 * largest)
    keys = np.array([3])
    ours = pipeline.codes(features[:, ::-1], seen[::-1], keys, OPTIONS)
    theirs = pipeline.codes(whole[:, ::-1], mask[::-1], keys, OPTIONS)
    np.testing.assert_array_equal(ours, theirs)


def test_a_negative_prompt_and_guidance_change_the_picture(pipeline):
    plain = pipeline(PROMPTS[:1], dataclasses.replace(OPTIONS, guidance=0.0))
    guided = pipeline(PROMPTS[:1], dataclasses.replace(OPTIONS, guidance=8.0))
    away = pipeline(
        PROMPTS[:1], dataclasses.replace(OPTIONS, guidance=8.0, negative_prompt="two dogs")
    )
    without = pipeline(
        PROMPTS[:1], dataclasses.replace(OPTIONS, guidance=0.0, negative_prompt="two dogs")
    )
    assert len({x.tobytes() for x in (plain, guided, away)}) == 3
    np.testing.assert_array_equal(plain, without)


def test_any_grid_can_be_asked_for(pipeline):
    assert pipeline(PROMPTS[:1], dataclasses.replace(OPTIONS, height=48, width=64)).shape == (
        1, 48, 64, 3,
    )  # fmt: skip
    with pytest.raises(UserError, match="multiples of 16"):
        pipeline(PROMPTS[:1], dataclasses.replace(OPTIONS, height=40))


def test_an_unknown_word_is_named(pipeline, caplog):
    with caplog.at_level(logging.WARNING):
        pipeline(["a zeppelin on a red background"], OPTIONS)
    assert "zeppelin" in caplog.text


@pytest.mark.parametrize(
    ("option", "value"),
    [("steps", 0), ("temperature", -1.0), ("protocol", 3), ("seed", -1), ("height", 100_000)],
)
def test_options_out_of_range_are_refused(option, value):
    with pytest.raises(UserError, match=option):
        Options(**{option: value})


def test_no_prompt_is_refused(pipeline):
    with pytest.raises(UserError, match="no prompt"):
        pipeline([], OPTIONS)


def test_a_damaged_folder_is_one_sentence(folder):
    path, tokenizer = folder
    weights = path / "generator.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match="damaged"):
        InstellaPipeline.from_folder(path, tokenizer)
    weights.unlink()
    with pytest.raises(UserError, match="missing"):
        InstellaPipeline.from_folder(path, tokenizer)


@pytest.mark.usefixtures("quick_compile")
@pytest.mark.parametrize(
    ("way", "target"), [("folder", "epsilon"), ("folder", "x"), ("stage", "x")]
)
def test_all_options_reach_the_diffusion_sampler(
    way, target, tiny_diffusion_config, tiny_tokenizer_folder, tmp_path
):
    config = tiny_diffusion_config.copy_and_resolve_references()
    config.loss.target = target
    stage = make_stage(config)
    params = sharding.values(jax.jit(lambda key: init_stage(stage, key))(jax.random.key(1)))
    params = jax.tree.map(
        lambda x: x + 0.4 * jax.random.normal(jax.random.key(x.size), x.shape), params
    )
    if way == "stage":
        pipeline = InstellaPipeline.from_stage(stage, params)
    else:
        model_folder.save(tmp_path, stage.describe(), params, text_folder=stage.text_folder)
        pipeline = InstellaPipeline.from_folder(tmp_path, tiny_tokenizer_folder)
    texts = [*PROMPTS, "", "", ""]
    features, mask = pipeline.describe(texts, pipeline.tokenise(texts))
    seeds = np.arange(3)
    options = Options(steps=4, guidance=3.0, temperature=0.6, rho=2.0, protocol=2)
    codes = np.asarray(pipeline.codes(features, mask, seeds, options))
    ids, seen = pipeline.text_tokenizer.encode(PROMPTS, pad_to=mask.shape[1])
    np.testing.assert_array_equal(mask, np.concatenate([seen, np.zeros_like(seen)]))
    states = jax.jit(stage.text_features)(params, {}, ids, seen)
    wanted = loops.sample_diffusion(
        stage.network, params["generator"], jnp.concatenate([states, states], axis=1), mask,
        loops.image_keys(jnp.asarray(seeds, jnp.uint32)), steps=4, guidance=3.0, temperature=0.6,
        rho=2.0, protocol=2, target=target,
    )  # fmt: skip
    np.testing.assert_array_equal(codes, wanted)
