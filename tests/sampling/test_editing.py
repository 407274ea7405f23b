"""Variations, edits of tokens, blends and animations, with the shipped weights."""

import re

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from instella_jax.sampling import editing, loops

PROMPT, OTHER = "a cat above a blue square", "a dog above a pizza"
QUICK = dict(num_inference_steps=6)


def code_of(pipe, prompt=PROMPT, seed=0):
    return pipe(prompt, seed=seed, output_type="codes", **QUICK).codes[0]


def test_noise_flips_half_of_its_time():
    code = (np.arange(64 * 32) % 3 == 0).reshape(1, 64, 32).astype(np.float32)
    for t in (0.0, 0.3, 1.0):
        noisy = np.asarray(loops.noisy_bits(jnp.asarray(code), t, loops.image_keys(jnp.arange(1))))
        assert np.mean(noisy != code) == pytest.approx(t / 2, abs=0.04 * t)


def test_strength_goes_from_nothing_to_everything(pipes):
    pipe = pipes["demo"]
    code = code_of(pipe, seed=4)
    assert (code != code_of(pipe, OTHER, 9)).mean() > 0.2
    changed = []
    for strength in (0.0, 0.5, 1.0):
        output = editing.vary(pipe, code, OTHER, strength=strength, seed=9, **QUICK)
        changed.append((output.codes[0] != code).mean())
    assert changed[0] == 0 < changed[1] < changed[2]
    np.testing.assert_array_equal(output.codes[0], code_of(pipe, OTHER, 9))
    several = editing.vary(pipe, code, PROMPT, strength=0.9, count=2, seed=9, **QUICK)
    assert several.seeds == [9, 10] and (several.codes[0] != several.codes[1]).any()
    np.testing.assert_array_equal(several.images[1].size, (64, 64))


def test_kept_tokens_stay_bit_by_bit(pipe):
    code = code_of(pipe)
    keep = np.arange(16) % 4 < 2
    output = editing.regenerate(pipe, code, keep, OTHER, count=2, seed=3, **QUICK)
    for found in output.codes:
        np.testing.assert_array_equal(found[keep], code[keep])
        assert (found[~keep] != code[~keep]).mean() > 0.03
    everything = editing.regenerate(pipe, code, keep | ~keep, OTHER, **QUICK)
    np.testing.assert_array_equal(everything.codes[0], code)
    nothing = editing.regenerate(pipe, code, keep & ~keep, OTHER, seed=3, **QUICK)
    np.testing.assert_array_equal(nothing.codes[0], code_of(pipe, OTHER, 3))


def test_what_is_kept_shapes_what_is_new(pipes):
    """With the upper half kept, the background of the lower half comes from it."""
    pipe = pipes["demo"]
    keep = np.arange(16) < 8
    for prompt in ("a cat on a red background", "a cat on a green background"):
        code = code_of(pipe, prompt, 1)
        output = editing.regenerate(pipe, code, keep, "a cat", seed=2)
        picture = np.asarray(output.images[0], np.float64)
        upper, lower = (np.median(half.reshape(-1, 3), 0) for half in np.split(picture, 2))
        np.testing.assert_allclose(upper, lower, atol=30)


def test_the_ends_of_a_blend_are_the_prompts(pipe):
    output = editing.blend(pipe, PROMPT, OTHER, count=3, seed=5, **QUICK)
    np.testing.assert_array_equal(output.codes[0], code_of(pipe, PROMPT, 5))
    np.testing.assert_array_equal(output.codes[2], code_of(pipe, OTHER, 5))
    same = editing.blend(pipe, PROMPT, PROMPT, count=2, seed=5, **QUICK)
    np.testing.assert_array_equal(same.codes[0], same.codes[1])


def test_a_generation_can_be_watched(pipe, tmp_path):
    frames = editing.watch(pipe, PROMPT, seed=2, **QUICK)
    assert len(frames) == (6 if pipe.kind == "diffusion" else 16)
    (picture,) = pipe(PROMPT, seed=2, **QUICK).images
    assert frames[-1].tobytes() == picture.tobytes()
    editing.save_gif(tmp_path / "a.gif", frames, milliseconds=50, last=700, zoom=2)
    with Image.open(tmp_path / "a.gif") as film:
        assert film.n_frames == len(frames) and film.size == (128, 128)
        assert film.info["duration"] == 50 and film.info["loop"] == 0
        film.seek(len(frames) - 1)
        assert film.info["duration"] == 700
        shown = np.asarray(film.convert("RGB").resize((64, 64), 0), np.float64)
    assert np.abs(shown - np.asarray(picture)).mean() < 8  # of 256 colours


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda p, c: editing.vary(p, c, "a cat", strength=1.5), "strength is 1.5: expected a num"),
        (lambda p, c: editing.vary(p, c[:3], "a cat"), "the code has the shape [3, 32]: expected"),
        (lambda p, c: editing.vary(p, c + 5.0, "a cat"), "the code holds other values than 0 and"),
        (
            lambda p, c: editing.regenerate(p, c, [True], "a cat"),
            "keep has the shape [1]: exp",
        ),
        (lambda p, c: editing.blend(p, "a cat", "a dog", count=1), "count is 1: expected at least"),
    ],
)
def test_mistakes_are_value_errors(pipes, call, sentence):
    with pytest.raises(ValueError, match="^" + re.escape(sentence)):
        call(pipes["demo"], np.zeros((16, 32)))


def test_an_autoregressive_model_has_no_noise(pipes):
    with pytest.raises(ValueError, match="use regenerate, which keeps some of the tokens"):
        editing.vary(pipes["demo_ar"], np.zeros((16, 32)), "a cat")


def test_a_blend_leads_away_from_its_negative_prompt(pipe):
    ends = "a cat on a red background", "a dog on a blue background"
    settings = dict(count=2, seed=3, guidance_scale=4.0, **QUICK)
    plain = editing.blend(pipe, *ends, **settings)
    away = editing.blend(pipe, *ends, negative_prompt="two green circles", **settings)
    assert (plain.codes != away.codes).any()
    assert plain.seeds == [3, 3]
