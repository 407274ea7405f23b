"""SceneEval: six tasks in the manner of GenEval, on held-out prompts of the emoji scenes.

Every prompt names a combination that never occurs in training. The judge is measured before it
judges: on true renderings (at least `TRUSTED` of them must be right), on renderings that have gone
through the tokenizer (the ceiling of any generator on it), and on true renderings with the prompts
of others (chance).
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from instella_jax.data.scenes import captions, sprites
from instella_jax.data.scenes.english import with_article
from instella_jax.data.scenes.maker import World, heldout_scene
from instella_jax.data.scenes.scene import Scene, Stream
from instella_jax.data.scenes.source import render
from instella_jax.errors import UserError
from instella_jax.evaluation.judge import Judgement, compare, judge
from instella_jax.evaluation.scenes import through_code
from instella_jax.sampling.options import Options, requests_of
from instella_jax.sampling.sampler import Sampler

# Share of true renderings that the judge must find right in each task.
TRUSTED = 0.97
# Scenes looked at for each prompt that is wanted: one in sixty is of the rarest task.
_LOOKED_AT = 1_000


def _coloured(name: str) -> bool:
    """Return whether an object's name says its colour, as "red heart" does."""
    colour, _, shape = name.partition(" ")
    return bool(shape) and colour in sprites.BACKGROUNDS


def _alone(scene: Scene) -> bool:
    return len(scene.objects) == 1


def _two(scene: Scene) -> bool:
    return len(scene.objects) == 2 and len(scene.counts) == 2


def _is_single(scene: Scene) -> bool:
    return _alone(scene) and not _coloured(scene.objects[0].name)


def _is_two(scene: Scene) -> bool:
    return _two(scene) and not all(_coloured(thing.name) for thing in scene.objects)


def _is_many(scene: Scene) -> bool:
    return len(scene.objects) > 1 and len(scene.counts) == 1


def _is_colour(scene: Scene) -> bool:
    return _alone(scene) and _coloured(scene.objects[0].name)


def _is_attribution(scene: Scene) -> bool:
    """Return whether the scene has two shapes in two colours, which could be exchanged."""
    if not (_two(scene) and all(_coloured(thing.name) for thing in scene.objects)):
        return False
    (colour, shape), (other_colour, other_shape) = (o.name.split(" ", 1) for o in scene.objects)
    return colour != other_colour and shape != other_shape


@dataclasses.dataclass(frozen=True)
class Task:
    """One of the six tasks.

    Attributes:
      fits: whether a scene is one of the task.
      templates: of the captions, on a background that is always named.
      right: whether a judgement of a picture is a success.
      meaning: of a success, in words.
    """

    fits: Callable[[Scene], bool]
    templates: tuple[captions.Template, ...]
    right: Callable[[Judgement], bool]
    meaning: str


_ONE_OBJECT = (captions.listed, captions.sized, captions.placed)
TASKS = {
    "single_object": Task(
        _is_single, _ONE_OBJECT, lambda one: one.objects, "the object and no other kind"
    ),
    "two_objects": Task(
        _is_two, (captions.listed,), lambda one: one.objects, "both objects and no other kind"
    ),
    "counting": Task(
        _is_many,
        (captions.listed,),
        lambda one: one.objects and one.count,
        "the object in its number and no other",
    ),
    "colours": Task(
        _is_colour,
        _ONE_OBJECT,
        lambda one: one.objects and one.background,
        "the shape in its colour on the background in its colour",
    ),
    "position": Task(
        _two,
        (captions.related,),
        lambda one: one.objects and one.position,
        "both objects, in their relation",
    ),
    "attribution": Task(
        _is_attribution, (captions.listed,), lambda one: one.objects, "both shapes, each its colour"
    ),
}


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A prompt with the scene it describes."""

    task: str
    text: str
    scene: Scene


def task_prompts(task: str, count: int, seed: int, world: World) -> list[Prompt]:
    """Return different held-out prompts of a task.

    Args:
      task: one of `TASKS`.
      count: how many; fewer where so many cannot be found in the world.
      seed: of the prompts.
      world: what scenes may be made of.

    Raises:
      UserError: there is none.
    """
    rule, found = TASKS[task], dict[str, Prompt]()
    for index in range(_LOOKED_AT * count):
        if len(found) == count:
            break
        stream = Stream(seed, "scene eval", task, index)
        scene = heldout_scene(stream, world)
        if not rule.fits(scene):
            continue
        text = stream.choice(rule.templates)(stream, scene)
        if text is None:
            continue
        text = f"{text} on {with_article(scene.background)} background"
        found.setdefault(text, Prompt(task, text, scene))
    if not found:
        raise UserError(
            f"no held-out scene of these concepts is one of {task}: leave it out of --tasks"
        )
    return list(found.values())


def right(prompts: Sequence[Prompt], judgements: Sequence[Judgement]) -> np.ndarray:
    """Return which pictures do what their prompts' tasks ask: bool [n]."""
    pairs = zip(prompts, judgements, strict=True)
    return np.array([TASKS[prompt.task].right(one) for prompt, one in pairs], bool)


def measure_judge(
    prompts: Sequence[Prompt], network: Any, params: Any, size: int
) -> dict[str, np.ndarray]:
    """Return which of the prompts' true pictures the judge finds right, each bool [n].

    Args:
      prompts: n, those of a task together.
      network: of the tokenizer that gives the ceiling.
      params: its parameters.
      size: of the pictures.

    Returns:
      "true" pictures; the same through the tokenizer, "ceiling"; with the next prompt of the
      same task, "chance".

    Raises:
      UserError: too few of the true pictures of a task are found right.
    """
    facts = [prompt.scene for prompt in prompts]
    pictures = np.stack([render(scene, size) for scene in facts])
    seen = judge(pictures, facts)
    true = right(prompts, seen)
    tasks = np.array([prompt.task for prompt in prompts])
    for task in dict.fromkeys(tasks):
        if (share := true[tasks == task].mean()) < TRUSTED:
            raise UserError(
                f"the judge finds only {share:.3f} of the true pictures of {task} right, expected "
                f"{TRUSTED}: what it says of others means nothing, so leave the task out of --tasks"
            )
    following = np.arange(len(prompts))
    for task in dict.fromkeys(tasks):
        rows = np.flatnonzero(tasks == task)
        following[rows] = np.roll(rows, -1)
    strangers = [compare(seen[i].seen, facts[k]) for i, k in enumerate(following)]
    copies = judge(through_code(network, params, pictures), facts)
    return {"true": true, "ceiling": right(prompts, copies), "chance": right(prompts, strangers)}


@dataclasses.dataclass(frozen=True)
class SceneReport:
    """What SceneEval finds of a model.

    Attributes:
      prompts: all of them, those of a task together.
      right: bool [prompts, images of each].
      judge: see `measure_judge`.
      pictures: uint8 [prompts, images of each, h, w, 3].
      seen: what the judge saw in each picture, in the order of `pictures`.
    """

    prompts: list[Prompt]
    right: np.ndarray
    judge: dict[str, np.ndarray]
    pictures: np.ndarray
    seen: list[Scene]

    def scores(self) -> dict[str, dict[str, float]]:
        """Return figures by task, and their unweighted means as "overall".

        Each task has "correct" with "error", the standard error over prompts, and "true",
        "ceiling" and "chance" of the judge.
        """
        tasks = np.array([prompt.task for prompt in self.prompts])
        found: dict[str, dict[str, float]] = {}
        for task in dict.fromkeys(tasks):
            rows = tasks == task
            each = self.right[rows].mean(1)
            error = each.std(ddof=1) / np.sqrt(len(each)) if len(each) > 1 else np.nan
            found[str(task)] = {
                "correct": float(each.mean()),
                "error": float(error),
                **{name: float(value[rows].mean()) for name, value in self.judge.items()},
            }
        names = next(iter(found.values()))
        overall = {name: float(np.mean([one[name] for one in found.values()])) for name in names}
        squares = [one["error"] ** 2 for one in found.values()]
        overall["error"] = float(np.sqrt(np.sum(squares)) / len(squares))
        return {**found, "overall": overall}

    def images(self) -> list[dict[str, Any]]:
        """Return for each picture its task, prompt, seed offset, verdict and what was seen."""
        return [
            {
                "task": prompt.task,
                "prompt": prompt.text,
                "picture": picture,
                "right": bool(self.right[row, picture]),
                "seen": dataclasses.asdict(self.seen[row * self.right.shape[1] + picture]),
            }
            for row, prompt in enumerate(self.prompts)
            for picture in range(self.right.shape[1])
        ]

    def examples(self, each: int = 8) -> tuple[np.ndarray, list[str], int]:
        """Return the first picture of some prompts of each task, their captions, how many."""
        tasks = np.array([prompt.task for prompt in self.prompts])
        rows = [i for task in dict.fromkeys(tasks) for i in np.flatnonzero(tasks == task)[:each]]
        words = [
            f"{self.prompts[i].text} ({'right' if self.right[i, 0] else 'wrong'})" for i in rows
        ]
        return self.pictures[rows, 0], words, each


def scene_eval(
    sampler: Sampler,
    options: Options,
    *,
    tasks: Sequence[str] = tuple(TASKS),
    prompts_per_task: int = 100,
    seed: int = 0,
    concepts: tuple[str, ...] = sprites.CORE,
    styles: tuple[str, ...] = ("twemoji",),
    places: str = "thirds",
    max_objects: int = 3,
    show: Callable[[str], None] = lambda line: None,
) -> SceneReport:
    """Measure the judge, sample the prompts of all tasks and judge the images.

    Args:
      sampler: the model.
      options: of sampling; picture j of a prompt has the seed `options.seed` + j.
      tasks: out of `TASKS`.
      prompts_per_task: at most.
      seed: of the prompts.
      concepts: objects of the world that the model was trained in.
      styles: drawing styles likewise.
      places: places likewise, see `EmojiScenes`.
      max_objects: the most objects in a scene likewise.
      show: is given a line of progress.

    Raises:
      UserError: a task has no prompts, or the judge does not know true pictures.
    """
    world = World(concepts, styles, places, max_objects, sampler.image_size)
    prompts = [p for task in tasks for p in task_prompts(task, prompts_per_task, seed, world)]
    show(f"measuring the judge on {len(prompts)} true pictures")
    network, params = sampler.tokenizer, sampler.params["tokenizer"]
    ruler = measure_judge(prompts, network, params, sampler.image_size)
    total = len(prompts) * options.images_per_prompt
    pictures: list[np.ndarray] = []
    requests = requests_of([prompt.text for prompt in prompts], options)
    for batch in sampler.batches(requests, options):
        pictures.extend(batch.images)
        show(f"sampled {len(pictures)} of {total} images")
    owners = [prompt for prompt in prompts for _ in range(options.images_per_prompt)]
    show(f"judging {total} images")
    judgements = judge(np.stack(pictures), [owner.scene for owner in owners], concepts)
    shape = len(prompts), options.images_per_prompt
    return SceneReport(
        prompts,
        right(owners, judgements).reshape(shape),
        ruler,
        np.stack(pictures).reshape(*shape, *pictures[0].shape),
        [one.seen for one in judgements],
    )
