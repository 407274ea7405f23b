import hashlib
import itertools
import os
import pickle
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest

from instella_jax.data.scenes import sprites
from instella_jax.data.scenes.combinations import (
    heldout_background,
    heldout_count,
    heldout_facts,
    heldout_relation,
)
from instella_jax.data.scenes.scene import Placed, Scene
from instella_jax.data.scenes.source import EmojiScenes, heldout_prompts, render
from instella_jax.errors import UserError
from tests.paths import ROOT

STYLES = ("twemoji", "fluent")


def _digest() -> str:
    digest = hashlib.sha256()
    for split in ("train", "heldout"):
        source = EmojiScenes(split=split, seed=3, places="free", styles=STYLES)
        for index in (0, 1, 977, 9_999_999):
            element = source[index]
            digest.update(element["image"].tobytes() + element["text"].encode())
            digest.update(repr(element["facts"]).encode())
    return digest.hexdigest()


@pytest.mark.parametrize("hash_seed", ["1", "2"])
def test_same_scenes_in_another_process(hash_seed: str):
    code = "from tests.data.scenes.test_source import _digest; print(_digest())"
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.strip() == _digest()


def test_scenes_do_not_depend_on_what_was_read_before():
    source = EmojiScenes(seed=1)
    forward = [source[index] for index in range(20)]
    again = pickle.loads(pickle.dumps(EmojiScenes(seed=1)))
    for index in reversed(range(20)):
        element = again[np.int64(index)]
        np.testing.assert_array_equal(element["image"], forward[index]["image"])
        assert element["text"] == forward[index]["text"]
        assert element["facts"] == forward[index]["facts"]


def test_seeds_splits_and_indices_differ():
    first = [
        EmojiScenes(seed=seed, split=split).facts(index)
        for seed in (0, 1)
        for split in ("train", "heldout")
        for index in range(50)
    ]
    assert len(set(map(repr, first))) > 190


def _ink(source: EmojiScenes, scene: Scene, image: np.ndarray) -> None:
    """Checks pixels against facts: plain outside the boxes, and drawn inside each of them."""
    size = source.world.size
    ground = np.array(sprites.BACKGROUNDS[scene.background])
    changed = (image != ground).any(-1)
    inside = np.zeros((size, size), int)
    for placed in scene.objects:
        top, left, side = (round(v * size) for v in (placed.top, placed.left, placed.side))
        assert 0 <= top <= size - side
        assert 0 <= left <= size - side
        box = np.s_[top : top + side, left : left + side]
        inside[box] += 1
        seen = np.linalg.norm(image[box].astype(float) - ground, axis=-1) > 40
        # Thin lines have no solid pixel when they are small: all that is painted counts.
        painted = sprites.sprite(placed.name, scene.style, side)[..., 3]
        assert seen.mean() > 0.05, (placed, scene)
        assert seen.sum() > 0.5 * painted.sum(), (placed, scene)
    assert inside.max() <= 1, "objects overlap"
    assert not changed[inside == 0].any()


@pytest.mark.parametrize("size", [64, 96, 128])
@pytest.mark.parametrize("places", ["thirds", "snapped", "free"])
@pytest.mark.parametrize("styles", [("twemoji",), ("fluent",), STYLES])
def test_pixels_show_the_facts(size: int, places: str, styles: tuple[str, ...]):
    source = EmojiScenes(size=size, places=places, styles=styles, concepts="core")
    for index in range(60):
        element = source[index]
        assert element["image"].shape == (size, size, 3)
        assert element["image"].dtype == np.uint8
        assert element["facts"].style in styles
        _ink(source, element["facts"], element["image"])


def test_all_concepts_can_be_drawn():
    source = EmojiScenes(concepts="all", styles=STYLES)
    assert len(source.world.concepts) > 700
    for name, style in itertools.product(source.world.concepts, STYLES):
        for background in sprites.visible_backgrounds(name, style):
            scene = Scene(background, style, (Placed(name, 0.25, 0.5, 3 / 8),))
            _ink(source, scene, render(scene, 64))


def test_snapped_scenes_lie_on_the_grid():
    source = EmojiScenes()
    for index in range(500):
        for placed in source.facts(index).objects:
            assert (placed.left * 8) % 1 == 0
            assert (placed.top * 8) % 1 == 0
            assert placed.side in (3 / 8, 4 / 8)


def test_thirds_are_the_nine_places_that_captions_tell():
    source = EmojiScenes(places="thirds")
    things = [placed for index in range(500) for placed in source.facts(index).objects]
    spots = {(placed.left, placed.top) for placed in things}
    assert spots == {(x / 4, y / 4) for x in range(3) for y in range(3)}
    assert len({(spot, placed.place) for spot in spots for placed in things
                if spot == (placed.left, placed.top)}) == 9  # fmt: skip


def test_snapped_facts_are_the_same_at_every_size():
    small, large = EmojiScenes(size=64), EmojiScenes(size=128)
    assert [small.facts(i) for i in range(50)] == [large.facts(i) for i in range(50)]
    assert [small.caption(i) for i in range(50)] == [large.caption(i) for i in range(50)]


def _holds_heldout(scene: Scene) -> bool:
    """Whether any held-out combination is true, counted here once more."""
    names = [placed.name for placed in scene.objects]
    for name in names:
        if heldout_background(name) == scene.background:
            return True
        if heldout_count(name) == names.count(name):
            return True
    for a in scene.objects:
        for b in scene.objects:
            ax, bx = a.left + a.side / 2, b.left + b.side / 2
            ay, by = a.top + a.side / 2, b.top + b.side / 2
            if ax < bx and heldout_relation(a.name, "left of", b.name):
                return True
            if ay < by and heldout_relation(a.name, "above", b.name):
                return True
    return False


@pytest.mark.slow
def test_no_held_out_combination_in_100_000_training_scenes():
    source = EmojiScenes()
    numbers, objects, backgrounds = Counter(), Counter(), Counter()
    for index in range(100_000):
        scene = source.facts(index)
        assert not _holds_heldout(scene), (index, scene)
        numbers[len(scene.objects)] += 1
        backgrounds[scene.background] += 1
        objects.update(scene.counts.items())
    # Every part of a held-out combination is seen.
    assert set(backgrounds) == set(sprites.BACKGROUNDS)
    assert min(numbers.values()) > 10_000
    for name in sprites.CORE:
        assert objects[name, 1] > 1000
        assert all(objects[name, n] for n in (2, 3) if heldout_count(name) != n)


@pytest.mark.parametrize("max_objects", [1, 2, 3])
@pytest.mark.parametrize("places", ["thirds", "snapped", "free"])
def test_held_out_scenes_hold_a_held_out_combination(max_objects: int, places: str):
    source = EmojiScenes(split="heldout", max_objects=max_objects, places=places)
    for index in range(1000):
        scene = source.facts(index)
        assert _holds_heldout(scene)
        assert heldout_facts(scene)
        assert len(scene.objects) <= max_objects


def test_prompts_are_held_out_and_fixed():
    prompts = heldout_prompts(64)
    assert len(prompts) == 64
    assert prompts[:10] == heldout_prompts(10)
    assert all(_holds_heldout(scene) for _, scene in prompts)
    assert len({text for text, _ in prompts}) > 60


def test_the_prompt_of_the_readme_is_not_held_out():
    hearts = Scene("blue", "twemoji", tuple(Placed("red heart", x, 0, 0.375) for x in (0, 0.5)))
    assert not heldout_facts(hearts)


def test_a_few_concepts_suffice():
    for split in ("train", "heldout"):
        source = EmojiScenes(split=split, concepts=("cat",), max_objects=3)
        assert {name for i in range(50) for name in source.facts(i).counts} == {"cat"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"size": 60}, "60"),
        ({"split": "test"}, "test"),
        ({"places": "anywhere"}, "anywhere"),
        ({"max_objects": 4}, "4"),
        ({"styles": ("noto",)}, "noto"),
        ({"styles": ()}, "styles"),
        ({"concepts": "everything"}, "everything"),
        ({"concepts": ("cat", "gryphon")}, "gryphon"),
        ({"concepts": ()}, "concepts"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict, words: str):
    with pytest.raises(UserError, match=words):
        EmojiScenes(**arguments)


def test_indices_end():
    source = EmojiScenes(length=10)
    assert len(source) == 10
    for index in (-1, 10):
        with pytest.raises(IndexError):
            source[index]
