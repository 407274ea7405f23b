import dataclasses

import numpy as np
import pytest

from instella_jax.data.scenes import sprites
from instella_jax.data.scenes.combinations import heldout_facts
from instella_jax.data.scenes.maker import World
from instella_jax.data.scenes.source import render
from instella_jax.errors import UserError
from instella_jax.evaluation import scene_eval
from instella_jax.evaluation.scene_eval import TASKS, task_prompts
from instella_jax.sampling.options import Options
from instella_jax.sampling.sampler import Samples
from tests.data.scenes.caption_reader import read
from tests.data.scenes.test_captions import CORE, is_true

WORLD = World(sprites.CORE, ("twemoji",), "thirds", 3, 64)


@pytest.fixture
def same_code(monkeypatch):
    monkeypatch.setattr(scene_eval, "through_code", lambda network, params, pictures: pictures)


class Painter:
    """A sampler that paints every prompt as `change` makes its scene."""

    tokenizer, params, image_size = None, {"tokenizer": None}, 64

    def __init__(self, prompts, change=lambda scene: scene):
        self.scenes = {prompt.text: change(prompt.scene) for prompt in prompts}

    def batches(self, requests, options):
        for request in requests:
            yield Samples(render(self.scenes[request.prompt], 64)[None], np.zeros((1, 1, 1)))


def evaluate(task, change=lambda scene: scene, count=12):
    painter = Painter(task_prompts(task, count, 0, WORLD), change)
    report = scene_eval.scene_eval(
        painter, Options(images_per_prompt=2), tasks=[task], prompts_per_task=count
    )
    return report.scores()[task]


@pytest.mark.parametrize("task", TASKS)
def test_prompts_are_held_out_different_and_of_their_task(task):
    prompts = task_prompts(task, 40, 0, WORLD)
    assert len({prompt.text for prompt in prompts}) == 40
    assert all(heldout_facts(prompt.scene) for prompt in prompts)
    assert prompts == task_prompts(task, 40, 0, WORLD)
    assert prompts != task_prompts(task, 40, 1, WORLD)
    numbers = {
        "single_object": (1, 1), "two_objects": (2, 2), "counting": (1, 3), "colours": (1, 1),
        "position": (2, 2), "attribution": (2, 2),
    }  # fmt: skip
    kinds, most = numbers[task]
    for prompt in prompts:
        names = [thing.name for thing in prompt.scene.objects]
        assert len(set(names)) == kinds and kinds <= len(names) <= most
        assert (len(names) > 1) == (task not in ("single_object", "colours"))
        assert f"{prompt.scene.background} background" in prompt.text
        coloured = [name.split()[0] in sprites.BACKGROUNDS for name in names]
        assert all(coloured) or task not in ("colours", "attribution")
        assert not any(coloured) or task != "single_object"


def test_captions_say_what_an_independent_reader_finds_true():
    for task in TASKS:
        for prompt in task_prompts(task, 20, 0, WORLD):
            assert is_true(read(prompt.text, CORE), prompt.scene), prompt.text


@pytest.mark.parametrize("task", TASKS)
def test_true_pictures_are_right_and_strangers_wrong(task, same_code):
    scores = evaluate(task)
    assert scores["correct"] == scores["true"] == scores["ceiling"] == 1
    assert scores["chance"] < 0.3 and scores["error"] == 0


def without_the_last(scene):
    return dataclasses.replace(scene, objects=scene.objects[:-1])


def exchanged(scene):
    a, b = scene.objects
    moved = (dataclasses.replace(a, name=b.name), dataclasses.replace(b, name=a.name))
    return dataclasses.replace(scene, objects=moved)


def recoloured(scene):
    """Both shapes with the colour of the other one."""
    (colour, shape), (other_colour, other_shape) = (o.name.split() for o in scene.objects)
    names = f"{other_colour} {shape}", f"{colour} {other_shape}"
    things = [dataclasses.replace(o, name=n) for o, n in zip(scene.objects, names, strict=True)]
    return dataclasses.replace(scene, objects=tuple(things))


def on_black(scene):
    ground = "white" if scene.background == "black" else "black"
    return dataclasses.replace(scene, background=ground)


@pytest.mark.parametrize(
    ("task", "change"),
    [
        ("single_object", without_the_last),
        ("two_objects", without_the_last),
        ("counting", without_the_last),
        ("colours", on_black),
        ("position", exchanged),
        ("attribution", recoloured),
    ],
)
def test_what_a_task_asks_is_what_it_judges(task, change, same_code):
    # A recoloured shape may be one that cannot be seen on its background.
    assert evaluate(task, change)["correct"] <= 0.1


def test_scores_by_hand(same_code):
    prompts = task_prompts("counting", 4, 0, WORLD)
    right = np.array([[1, 1], [1, 0], [0, 0], [1, 1]], bool)
    ruler = {"true": np.ones(4), "ceiling": np.array([1, 1, 1, 0]), "chance": np.zeros(4)}
    report = scene_eval.SceneReport(prompts, right, ruler, np.zeros((4, 2, 8, 8, 3)), [])
    scores = report.scores()["counting"]
    # Shares 1, 1/2, 0, 1: mean 5/8, standard deviation sqrt(11/48), over sqrt(4).
    assert scores["correct"] == 0.625 and scores["ceiling"] == 0.75
    assert scores["error"] == pytest.approx(np.sqrt(11 / 48) / 2)


def test_overall_is_the_mean_of_tasks_whatever_their_size(same_code):
    prompts = task_prompts("counting", 4, 0, WORLD) + task_prompts("colours", 2, 0, WORLD)
    right = np.array([[1, 1], [1, 0], [0, 0], [1, 1], [0, 0], [1, 0]], bool)
    ruler = {name: np.arange(6) / 8 for name in ("true", "ceiling", "chance")}
    report = scene_eval.SceneReport(prompts, right, ruler, np.zeros((6, 2, 8, 8, 3)), [])
    scores = report.scores()
    assert list(scores) == ["counting", "colours", "overall"]
    # Colours: shares 0 and 1/2, standard deviation sqrt(1/8), over sqrt(2).
    assert scores["colours"]["correct"] == 0.25
    assert scores["colours"]["error"] == pytest.approx(0.25)
    assert scores["colours"]["true"] == pytest.approx((4 + 5) / 16)
    overall = scores["overall"]
    assert overall["correct"] == pytest.approx((0.625 + 0.25) / 2)
    assert overall["chance"] == pytest.approx((1.5 / 8 + 4.5 / 8) / 2)
    # Of a mean of two independent figures.
    assert overall["error"] == pytest.approx(np.sqrt(11 / 48 / 4 + 0.25**2) / 2)
    # The error of one prompt is not known.
    lonely = scene_eval.SceneReport(prompts[:1], right[:1], {}, np.zeros((1, 2, 8, 8, 3)), [])
    assert np.isnan(lonely.scores()["counting"]["error"])


def test_each_picture_is_reported_with_what_was_seen_in_it():
    prompts = task_prompts("counting", 3, 0, WORLD) + task_prompts("colours", 2, 0, WORLD)
    right = np.arange(10).reshape(5, 2) % 3 == 0
    pictures = np.arange(10, dtype=np.uint8).reshape(5, 2, 1, 1, 1)
    seen = [dataclasses.replace(prompts[0].scene, background=f"ground {n}") for n in range(10)]
    report = scene_eval.SceneReport(prompts, right, {}, pictures, seen)
    rows = report.images()
    assert [row["seen"]["background"] for row in rows] == [f"ground {n}" for n in range(10)]
    assert [row["right"] for row in rows] == [n % 3 == 0 for n in range(10)]
    assert [row["picture"] for row in rows] == [0, 1] * 5
    assert [row["prompt"] for row in rows] == [p.text for p in prompts for _ in range(2)]
    assert [row["task"] for row in rows] == ["counting"] * 6 + ["colours"] * 4
    shown, words, each = report.examples(2)
    assert each == 2 and shown.ravel().tolist() == [0, 2, 6, 8]
    assert [word.rpartition(" ")[2] for word in words] == [
        "(right)",
        "(wrong)",
        "(right)",
        "(wrong)",
    ]
    assert words[2].startswith(prompts[3].text)


def test_a_judge_is_trusted_task_by_task(monkeypatch, same_code):
    """Many right ones of a task make nothing good of another."""

    def spoilt(scene, size):
        one = len(scene.objects) == 1
        return render(on_black(scene) if one else scene, size)

    monkeypatch.setattr(scene_eval, "render", spoilt)
    prompts = task_prompts("counting", 36, 0, WORLD) + task_prompts("colours", 1, 0, WORLD)
    with pytest.raises(UserError, match="only 0.000 of the true pictures of colours"):
        scene_eval.measure_judge(prompts, None, None, 64)


def test_chance_stays_within_a_task(same_code):
    """Of two prompts each is shown the other one's picture, never one of another task."""
    prompts = task_prompts("single_object", 2, 0, WORLD) + task_prompts("counting", 1, 0, WORLD)
    ruler = scene_eval.measure_judge(prompts, None, None, 64)
    # A task of one prompt has no stranger but itself.
    assert ruler["chance"].tolist() == [False, False, True]


def test_a_judge_that_does_not_know_true_pictures_is_no_judge(monkeypatch, same_code):
    monkeypatch.setattr(scene_eval, "render", lambda scene, size: render(on_black(scene), size))
    with pytest.raises(UserError, match="finds only 0.000 of the true pictures of colours right"):
        evaluate("colours")
