import pytest

from instella_jax.data.scenes import captions, sprites
from instella_jax.data.scenes.captions import TEMPLATES
from instella_jax.data.scenes.scene import Placed, Scene, Stream
from instella_jax.data.scenes.source import EmojiScenes, heldout_prompts
from tests.data.scenes.caption_reader import PLACES, lies, read

CORE = {sprites.catalogue()[name].singular.split(" ", 1)[1]: name for name in sprites.CORE}
CORE |= {sprites.catalogue()[name].plural: name for name in sprites.CORE}


def is_true(claims: dict, scene: Scene) -> bool:
    """Whether what a caption claims holds in the scene, from the centres and names alone."""
    objects = scene.objects
    centres = [(o.name, o.left + o.side / 2, o.top + o.side / 2) for o in objects]
    counts = {name: sum(o.name == name for o in objects) for name in {o.name for o in objects}}
    if claims["background"] not in (None, scene.background) or claims["counts"] != counts:
        return False
    if claims["style"] not in (None, scene.style):
        return False
    for name, place in claims["places"]:
        if not any(name == other and lies(place, x, y) for other, x, y in centres):
            return False
    for name, x, y in centres if claims["places"] else ():
        if not any(name == other and lies(place, x, y) for other, place in claims["places"]):
            return False
    for a, word, b in claims["relations"]:
        for _, ax, ay in (c for c in centres if c[0] == a):
            for _, bx, by in (c for c in centres if c[0] == b):
                dx, dy = bx - ax, by - ay
                sideways = abs(dx) > abs(dy)
                wanted = {
                    "left of": sideways and dx > 0,
                    "right of": sideways and dx < 0,
                    "above": abs(dy) > abs(dx) and dy > 0,
                    "below": abs(dy) > abs(dx) and dy < 0,
                }
                if not wanted[word]:
                    return False
    if claims["arranged"]:
        (_, ax, ay), (_, bx, by) = centres
        if (abs(ax - bx) > abs(ay - by)) != (claims["arranged"] == "row"):
            return False
    if claims["size"]:
        return (objects[0].side > 0.4) == (claims["size"] == "large")
    return True


@pytest.mark.parametrize("places", ["thirds", "snapped", "free"])
@pytest.mark.parametrize("split", ["train", "heldout"])
def test_captions_are_true(places: str, split: str):
    source = EmojiScenes(split=split, places=places, styles=("twemoji", "fluent"))
    for index in range(1500):
        scene = source.facts(index)
        text = source.caption(index)
        assert is_true(read(text, CORE), scene), (text, scene)


def test_a_wrong_scene_is_noticed():
    source = EmojiScenes()
    wrong = sum(is_true(read(source.caption(i), CORE), source.facts(i + 1)) for i in range(500))
    assert wrong < 10


def test_every_wording_is_reached():
    source = EmojiScenes()
    texts = [source.caption(index) for index in range(20_000)]
    claims = [read(text, CORE) for text in texts]
    assert {place for claim in claims for _, place in claim["places"]} == set(PLACES.values())
    for words in (*PLACES, "to the left of", "to the right of", "above", "below"):
        assert any(f" {words}" in text for text in texts), words
    assert {claim["background"] for claim in claims} == {None, *sprites.BACKGROUNDS}
    assert {claim["arranged"] for claim in claims} == {None, "row", "column"}
    assert {claim["size"] for claim in claims} == {None, "large", "small"}
    assert {n for claim in claims for n in claim["counts"].values()} == {1, 2, 3}
    assert {len(claim["relations"]) for claim in claims} == {0, 1, 2}
    assert {name for claim in claims for name in claim["counts"]} == set(sprites.CORE)


@pytest.mark.parametrize("template", [template for template, _ in TEMPLATES])
def test_every_template_fits_some_scene(template):
    source = EmojiScenes()
    made = [template(Stream(index), source.facts(index)) for index in range(300)]
    assert any(made)


def test_captions_are_short():
    for split in ("train", "heldout"):
        source = EmojiScenes(split=split, styles=sprites.styles())
        lengths = [len(source.caption(i).replace(",", " ,").split()) for i in range(5000)]
        assert max(lengths) <= 32
        assert min(lengths) <= 3


def test_the_same_facts_have_several_wordings():
    scene = EmojiScenes().facts(0)
    assert len({captions.caption(Stream(index), scene) for index in range(200)}) > 10


def test_known_phrases_are_said():
    hearts = Scene(
        "blue",
        "twemoji",
        (Placed("red heart", 0, 0.25, 0.375), Placed("red heart", 0.5, 0.25, 0.375)),
    )
    pair = Scene(
        "white", "twemoji", (Placed("cat", 0, 0.25, 0.375), Placed("dog", 0.5, 0.25, 0.375))
    )
    pizza = Scene("white", "twemoji", (Placed("pizza", 0, 0, 0.375),))

    def said(scene: Scene) -> set[str]:
        return {captions.caption(Stream(index), scene) for index in range(2000)}

    assert "two red hearts on a blue background" in said(hearts)
    assert "two red hearts side by side on a blue background" in said(hearts)
    assert "a cat to the left of a dog on a white background" in said(pair)
    assert "a pizza at the top left" in said(pizza)
    assert "a pizza in the top left corner on a white background" in said(pizza)


def test_prompts_say_everything():
    for text, scene in heldout_prompts(200):
        claims = read(text, CORE)
        assert is_true(claims, scene)
        assert claims["background"] == scene.background
        assert claims["places"] or claims["relations"]
