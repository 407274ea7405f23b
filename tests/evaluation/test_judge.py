import dataclasses

import numpy as np
import pytest

from instella_jax.data.scenes import sprites
from instella_jax.data.scenes.scene import Placed, Scene
from instella_jax.data.scenes.source import EmojiScenes, render
from instella_jax.evaluation.judge import compare, judge, read, summarise


def _true(size: int = 64, **arguments):
    source = EmojiScenes(size=size, split="heldout", **arguments)
    elements = [source[index] for index in range(64)]
    return np.stack([e["image"] for e in elements]), [e["facts"] for e in elements]


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [{}, {"places": "free"}, {"styles": ("fluent",)}, {"size": 96, "places": "free"}],
)
def test_true_scenes_are_right(arguments: dict):
    rates = summarise(judge(*_true(**arguments)))
    assert rates["background"] == 1
    assert min(rates.values()) >= 0.97


@pytest.mark.slow
def test_noise_and_blur_are_borne():
    images, scenes = _true()
    noise = np.random.default_rng(0).normal(0, 20, images.shape)
    noisy = np.clip(images + noise, 0, 255).astype(np.uint8)
    blurred = images.reshape(-1, 32, 2, 32, 2, 3).mean((2, 4)).repeat(2, 1).repeat(2, 2)
    for damaged in (noisy, blurred.astype(np.uint8)):
        assert min(summarise(judge(damaged, scenes)).values()) >= 0.95


def test_pictures_of_other_scenes_are_wrong():
    images, scenes = _true()
    rates = summarise(judge(images, scenes[1:] + scenes[:1]))
    assert rates["background"] < 0.3
    assert rates["objects"] < 0.05
    assert rates["position"] < 0.05


def test_plain_pictures_and_blobs_are_wrong():
    _, scenes = _true()
    plain = np.stack([render(dataclasses.replace(s, objects=()), 64) for s in scenes])
    rates = summarise(judge(plain, scenes))
    assert rates == {"background": 1.0, "objects": 0.0, "count": 0.0, "position": 0.0}
    y, x = np.mgrid[:64, :64] / 64
    blobs = plain.astype(float)
    for image, scene in zip(blobs, scenes, strict=True):
        for thing in scene.objects:
            drawn = sprites.sprite(thing.name, scene.style, 24)
            colour = drawn[..., :3].sum((0, 1)) / drawn[..., 3].sum() * 255
            square = (x - thing.x) ** 2 + (y - thing.y) ** 2
            soft = np.exp(-square / (2 * (thing.side / 3) ** 2))[..., None]
            image[:] = image * (1 - soft) + colour * soft
    assert summarise(judge(blobs.astype(np.uint8), scenes))["objects"] < 0.25


def test_each_mistake_is_told_apart():
    cat, dog = Placed("cat", 0, 0.25, 0.375), Placed("dog", 0.5, 0.25, 0.375)
    truth = Scene("white", "twemoji", (cat, dog))

    def verdict(**changes) -> tuple[bool, bool, bool, bool]:
        seen = judge(render(dataclasses.replace(truth, **changes), 64)[None], [truth])[0]
        return seen.background, seen.objects, seen.count, seen.position

    assert verdict() == (True, True, True, True)
    assert verdict(background="blue") == (False, True, True, True)
    swapped = (dataclasses.replace(cat, left=0.5), dataclasses.replace(dog, left=0.0))
    assert verdict(objects=swapped) == (True, True, True, False)
    pig = dataclasses.replace(dog, name="pig")
    assert verdict(objects=(cat, pig)) == (True, False, True, False)
    assert verdict(objects=(cat,)) == (True, False, False, False)
    assert verdict(objects=(cat, dog, Placed("cat", 0, 0.625, 0.375))) == (True, True, False, True)


def test_one_kind_must_be_where_it_should():
    def scene(*places: tuple[float, float]) -> Scene:
        return Scene("white", "twemoji", tuple(Placed("cat", x, y, 0.375) for x, y in places))

    assert compare(scene((0, 0.625), (0.625, 0)), scene((0.625, 0), (0, 0.625))).position
    assert compare(scene((0.125, 0.0)), scene((0, 0))).position
    assert not compare(scene((0.625, 0)), scene((0, 0))).position
    assert not compare(scene((0, 0)), scene((0, 0), (0.625, 0))).position


def test_objects_outside_the_core_are_known():
    scene = Scene("white", "fluent", (Placed("zebra", 0.125, 0.5, 0.5),))
    assert all(summarise(judge(render(scene, 64)[None], [scene])).values())
    assert read(render(scene, 64), "fluent", (*sprites.CORE, "zebra")).counts == {"zebra": 1}
