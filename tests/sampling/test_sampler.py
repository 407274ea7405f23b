import dataclasses
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from instella_jax.errors import UserError
from instella_jax.runtime import sharding
from instella_jax.sampling import loops, prompt_features
from instella_jax.sampling.options import Options, requests_of
from instella_jax.sampling.sampler import Sampler
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
def sampler(folder):
    return Sampler.from_folder(*folder)


def assert_same_pictures(one, other):
    """As `Sampler` says: the bits are equal (tested by themselves), and decoding a batch of another
    size sums in another order, which is a grey level of a few pixels at most."""
    difference = one.astype(int) - other
    assert np.abs(difference).max() <= 1 and (difference != 0).mean() < 0.01


def test_pictures_are_of_the_prompts_in_order(sampler):
    drawn = sampler(PROMPTS, dataclasses.replace(OPTIONS, images_per_prompt=2))
    assert drawn.shape == (6, 32, 32, 3) and drawn.dtype == np.uint8
    assert len({picture.tobytes() for picture in drawn}) == 6


def test_a_picture_depends_on_prompt_and_seed_alone(sampler):
    together = sampler(PROMPTS, dataclasses.replace(OPTIONS, images_per_prompt=2, seed=5))
    for index, prompt in enumerate(PROMPTS):
        for picture in range(2):
            alone = sampler([prompt], dataclasses.replace(OPTIONS, seed=5 + picture))
            assert_same_pictures(alone[0], together[2 * index + picture])


def test_one_text_is_one_prompt(sampler):
    np.testing.assert_array_equal(sampler(PROMPTS[0], OPTIONS), sampler(PROMPTS[:1], OPTIONS))


def test_the_bits_of_a_code_are_the_same_alone_and_in_a_batch(sampler, monkeypatch):
    codes, sample = [], sampler.codes

    def watched(*args, **how):
        result = sample(*args, **how)
        codes.append(np.asarray(result))
        return result

    monkeypatch.setattr(sampler, "codes", watched)
    prompts = [f"{number} {prompt}" for prompt in PROMPTS for number in ("a", "two", "three")][:8]
    sampler(prompts, dataclasses.replace(OPTIONS, batch_size=8))
    for prompt in prompts:
        sampler(prompt, dataclasses.replace(OPTIONS, batch_size=8))
    together, *alone = codes
    assert together.shape[0] == 8 and 0.2 < together.mean() < 0.8
    np.testing.assert_array_equal(np.concatenate(alone), together)


def test_a_negative_prompt_without_guidance_is_said_to_do_nothing(sampler, caplog):
    options = dataclasses.replace(OPTIONS, negative_prompt=PROMPTS[1])
    sampler(PROMPTS[0], options)
    assert "does nothing" not in caplog.text
    sampler(PROMPTS[0], dataclasses.replace(options, guidance=0.0))
    assert "the negative prompt does nothing with guidance 0" in caplog.text


def test_batches_give_what_one_batch_gives(sampler):
    whole = sampler(PROMPTS, dataclasses.replace(OPTIONS, batch_size=8))
    for size in (1, 2):
        options = dataclasses.replace(OPTIONS, batch_size=size)
        parts = list(sampler.batches(requests_of(PROMPTS, options), options))
        assert [len(part.codes) for part in parts] == {1: [1, 1, 1], 2: [2, 1]}[size]
        assert_same_pictures(np.concatenate([part.images for part in parts]), whole)


def test_settings_change_without_compiling(sampler):
    sampler(PROMPTS[:1], OPTIONS)
    before = loops.sample_diffusion._cache_size(), loops.continue_ar._cache_size()
    sampler(PROMPTS[:1], dataclasses.replace(OPTIONS, steps=7, guidance=0.5, temperature=0.3))
    sampler(PROMPTS[1:2], dataclasses.replace(OPTIONS, rho=2.0, seed=9))
    assert before == (loops.sample_diffusion._cache_size(), loops.continue_ar._cache_size())


def test_repeated_prompts_are_encoded_once(sampler, monkeypatch):
    rows = []
    encode = prompt_features.text_features
    monkeypatch.setattr(
        prompt_features,
        "text_features",
        lambda network, params, ids, mask: (
            rows.append(len(ids)) or encode(network, params, ids, mask)
        ),
    )
    options = dataclasses.replace(OPTIONS, batch_size=6)
    sampler([PROMPTS[0]] * 5 + [PROMPTS[1]], options)
    assert rows == [1, 1]  # each by itself, and the empty one never
    sampler([PROMPTS[1], "", PROMPTS[1]], options)
    sampler(PROMPTS[:1], dataclasses.replace(options, negative_prompt=PROMPTS[2]))
    assert rows == [1, 1, 1]
    monkeypatch.setattr(prompt_features, "TEXT_CACHE", 1)
    sampler("a small boat", options)
    sampler(PROMPTS[:1], options)
    assert rows == [1, 1, 1, 1, 1]  # all but the last one were forgotten


def test_prompts_are_tokenised_once(sampler, monkeypatch):
    texts, encode = [], sampler.text_tokenizer.encode

    def watched(prompts, **options):
        texts.extend(prompts)
        return encode(prompts, **options)

    monkeypatch.setattr(sampler.text_tokenizer, "encode", watched)
    sampler([*PROMPTS, PROMPTS[0]], dataclasses.replace(OPTIONS, batch_size=2))
    sampler(PROMPTS[:1], OPTIONS)
    assert sorted(texts) == sorted([*PROMPTS, ""])


def test_the_empty_prompt_is_what_the_encoder_makes_of_it(sampler):
    texts = ["", PROMPTS[0]]
    length = sampler.text_length(texts)
    ids, mask = sampler.text_tokenizer.encode(texts, pad_to=length)
    whole = prompt_features.text_features(sampler.text, sampler.params["text"], ids, mask)
    features, seen = sampler.prompt_features(texts, length)
    np.testing.assert_array_equal(seen, mask)
    # Another number of rows is another order of sums, which shows in what is near 0 among numbers
    # of 6 on average.
    largest = np.abs(whole[:, mask]).max()
    np.testing.assert_allclose(features[:, seen], whole[:, mask], rtol=0, atol=1e-6 * largest)
    keys = np.array([3])
    ours = sampler.codes(features[:, ::-1], seen[::-1], keys, OPTIONS)
    theirs = sampler.codes(whole[:, ::-1], mask[::-1], keys, OPTIONS)
    np.testing.assert_array_equal(ours, theirs)


def test_a_negative_prompt_and_guidance_change_the_picture(sampler):
    plain = sampler(PROMPTS[:1], dataclasses.replace(OPTIONS, guidance=0.0))
    guided = sampler(PROMPTS[:1], dataclasses.replace(OPTIONS, guidance=8.0))
    away = sampler(
        PROMPTS[:1], dataclasses.replace(OPTIONS, guidance=8.0, negative_prompt="two dogs")
    )
    without = sampler(
        PROMPTS[:1], dataclasses.replace(OPTIONS, guidance=0.0, negative_prompt="two dogs")
    )
    assert len({x.tobytes() for x in (plain, guided, away)}) == 3
    np.testing.assert_array_equal(plain, without)


def test_any_grid_can_be_asked_for(sampler):
    assert sampler(PROMPTS[:1], dataclasses.replace(OPTIONS, height=48, width=64)).shape == (
        1, 48, 64, 3,
    )  # fmt: skip
    with pytest.raises(UserError, match="multiples of 16"):
        sampler(PROMPTS[:1], dataclasses.replace(OPTIONS, height=40))


def test_an_unknown_word_is_named(sampler, caplog):
    with caplog.at_level(logging.WARNING):
        sampler(["a zeppelin on a red background"], OPTIONS)
    assert "zeppelin" in caplog.text


@pytest.mark.parametrize(
    ("option", "value"),
    [("steps", 0), ("temperature", -1.0), ("protocol", 3), ("seed", -1), ("height", 100_000)],
)
def test_options_out_of_range_are_refused(option, value):
    with pytest.raises(UserError, match=option):
        Options(**{option: value})


def test_no_prompt_is_refused(sampler):
    with pytest.raises(UserError, match="no prompt"):
        sampler([], OPTIONS)


def test_a_damaged_folder_is_one_sentence(folder):
    path, tokenizer = folder
    weights = path / "generator.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match="damaged"):
        Sampler.from_folder(path, tokenizer)
    weights.unlink()
    with pytest.raises(UserError, match="missing"):
        Sampler.from_folder(path, tokenizer)


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
        sampler = Sampler.from_stage(stage, params)
    else:
        model_folder.save(tmp_path, stage.describe(), params, text_folder=stage.text_folder)
        sampler = Sampler.from_folder(tmp_path, tiny_tokenizer_folder)
    texts = [*PROMPTS, "", "", ""]
    features, mask = sampler.prompt_features(texts, sampler.text_length(texts))
    seeds = np.arange(3)
    options = Options(steps=4, guidance=3.0, temperature=0.6, rho=2.0, protocol=2)
    codes = np.asarray(sampler.codes(features, mask, seeds, options))
    ids, seen = sampler.text_tokenizer.encode(PROMPTS, pad_to=mask.shape[1])
    np.testing.assert_array_equal(mask, np.concatenate([seen, np.zeros_like(seen)]))
    states = jax.jit(stage.text_features)(params, {}, ids, seen)
    wanted = loops.sample_diffusion(
        stage.network, params["generator"], jnp.concatenate([states, states], axis=1), mask,
        loops.image_keys(jnp.asarray(seeds, jnp.uint32)), steps=4, guidance=3.0, temperature=0.6,
        rho=2.0, protocol=2, target=target,
    )  # fmt: skip
    np.testing.assert_array_equal(codes, wanted)
