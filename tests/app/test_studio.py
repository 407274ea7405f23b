import numpy as np
import pytest

from instella_jax.app.requests import BadField, Request
from instella_jax.app.studio import Studio, short_name
from instella_jax.sampling.pipeline import InstellaPipeline

PROMPTS = ("a cat above a blue square", "two red hearts on a blue background")


@pytest.fixture(scope="module")
def pipe():
    return InstellaPipeline.from_pretrained("demo")


@pytest.fixture
def studio(pipe):
    studio = Studio({"demo": pipe})
    yield studio
    assert studio.batcher.drain(60)


def pixels(output):
    return np.stack([np.asarray(image) for image in output.images])


@pytest.mark.slow
def test_a_picture_is_the_one_that_the_pipeline_gives_for_its_seed(studio, pipe):
    job = studio.submit(Request(PROMPTS[0], seed=7, steps=6))
    alone = pixels(pipe(PROMPTS[0], seed=7, num_inference_steps=6))
    np.testing.assert_array_equal(job.result(120).pictures, alone)


@pytest.mark.slow
def test_requests_of_the_same_settings_share_a_program_and_get_their_own(studio, pipe):
    # The first one holds the thread up for as long as the two others need to come.
    studio.submit(Request(PROMPTS[0], steps=1))
    jobs = [
        studio.submit(Request(prompt, seed=seed, steps=6, negative_prompt=negative))
        for prompt, seed, negative in ((PROMPTS[0], 3, ""), (PROMPTS[1], 9, "a cat"))
    ]
    found = [job.result(120).pictures for job in jobs]
    assert studio.batcher.batches == 2
    for job, pictures in zip(jobs, found, strict=True):
        (row,) = job.rows
        wanted = pixels(pipe(row.prompt, row.negative_prompt, seed=row.seed, num_inference_steps=6))
        # A batch of another size sums in another order: a grey level at most.
        assert np.abs(pictures.astype(int) - wanted.astype(int)).max() <= 1
    assert np.abs(found[0].astype(int) - found[1].astype(int)).max() > 100


@pytest.mark.slow
def test_previews_end_with_the_picture_itself(studio):
    seen = []
    job = studio.submit(
        Request(PROMPTS[0], pictures=2, steps=6), lambda *preview: seen.append(preview)
    )
    pictures = job.result(120).pictures
    assert [done for done, _, _ in seen] == [2 * step for step in range(1, 7)]
    np.testing.assert_array_equal(seen[-1][2], pictures)
    far = [np.abs(shown.astype(int) - pictures.astype(int)).mean() for _, _, shown in seen]
    assert far[0] > 4 * far[4] and far[0] > 10


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("model", {"model": "dall-e-3"}), ("size", {"height": 65, "width": 64}),
        ("size", {"height": 64, "width": 144}), ("size", {"height": -64, "width": 64}),
        ("size", {"height": True, "width": 64}), ("prompt", {"prompt": ""}),
    ],
)  # fmt: skip
def test_what_the_model_cannot_do_is_refused_at_once(studio, field, changes):
    with pytest.raises(BadField, match=field) as refused:
        studio.submit(Request(**{"prompt": PROMPTS[0], **changes}))
    assert refused.value.field == field
    assert studio.batcher.batches == studio.batcher.waiting == 0


def test_what_is_left_open_is_the_models_own(studio, pipe, monkeypatch):
    monkeypatch.setattr(pipe, "rho", 0.4)
    settings = studio.settings(Request(PROMPTS[0]))
    assert (settings.height, settings.width) == (64, 64)
    assert settings.guidance_scale == pipe.guidance_scale
    assert studio.settings(Request(PROMPTS[0], guidance_scale=0)).guidance_scale == 0
    assert settings.rho == 0.4 and studio.settings(Request(PROMPTS[0], rho=2)).rho == 2


def test_unknown_words_are_named_with_their_nearest(studio):
    assert studio.unknown_words(Request("a catt on a zeppelin")) == ["catt (cat?)", "zeppelin"]


@pytest.mark.parametrize(
    ("model", "name"),
    [("demo", "demo"), ("runs/mine", "mine"), ("/a/b/", "b"), ("owner/name", "name")],
)
def test_a_model_is_called_by_the_end_of_its_path(model, name):
    assert short_name(model) == name
