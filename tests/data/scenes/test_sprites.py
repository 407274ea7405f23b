import io
import json
import zipfile

import numpy as np
import pytest
from PIL import Image

from instella_jax.data.scenes import sprites
from instella_jax.data.scenes.english import plural, with_article


def test_every_concept_has_a_picture_in_every_style():
    with zipfile.ZipFile(sprites.ASSET) as archive:
        files = set(archive.namelist()) - {"index.json"}
        concepts = json.loads(archive.read("index.json"))["concepts"]
        assert files == {
            f"{style}/{c['code']}.webp" for style in sprites.styles() for c in concepts
        }
        for path in sorted(files)[::50]:
            assert Image.open(io.BytesIO(archive.read(path))).size == (64, 64)


def test_the_asset_is_small_and_has_its_notices():
    assert sprites.ASSET.stat().st_size < 4e6
    notice = (sprites.ASSET.parent / "NOTICE.md").read_text()
    for word in ("Twitter", "CC-BY-4.0", "Microsoft", "Miles Johnson", "Noto", "THE SOFTWARE IS"):
        assert word in notice


def test_names_are_told_apart():
    concepts = sprites.catalogue().values()
    phrases = [concept.singular for concept in concepts]
    phrases += [concept.plural for concept in concepts if concept.countable]
    assert len(set(phrases)) >= len(phrases) - sum(c.plural == c.name for c in concepts)
    assert len(sprites.CORE) == len(set(sprites.CORE)) == 48
    assert set(sprites.CORE) < set(sprites.catalogue())


def test_nothing_is_hidden_nearly_everywhere():
    for name, concept in sprites.catalogue().items():
        for style in sprites.styles():
            assert len(sprites.visible_backgrounds(name, style)) >= 5
        if name.split()[0] in sprites.BACKGROUNDS:
            assert all(name.split()[0] in hidden for hidden in concept.hidden.values())


@pytest.mark.parametrize("side", [24, 32, 48, 96])
def test_resizing_keeps_what_there_is(side: int):
    small, full = sprites.sprite("cat", "twemoji", side), sprites.sprite("cat", "twemoji", 64)
    assert small.shape == (side, side, 4)
    assert small.min() >= 0
    assert small.max() <= 1
    assert (small[..., :3] <= small[..., 3:] + 1e-5).all()
    np.testing.assert_allclose(small.mean((0, 1)), full.mean((0, 1)), atol=0.01)


def test_resizing_agrees_with_pillow():
    full = Image.fromarray(sprites.tile("panda", "twemoji", 64, "blue"))
    expected = np.asarray(full.resize((24, 24), Image.Resampling.BILINEAR), float)
    ours = sprites.tile("panda", "twemoji", 24, "blue").astype(float)
    assert np.abs(ours - expected).max() <= 3


def test_full_strength_colours_are_kept():
    centre = sprites.tile("red circle", "twemoji", 32, "white")[16, 16]
    np.testing.assert_allclose(centre, (221, 46, 68), atol=8)
    corner = sprites.tile("red circle", "twemoji", 32, "green")[0, 0]
    assert tuple(corner) == sprites.BACKGROUNDS["green"]


@pytest.mark.parametrize(
    ("name", "one", "many"),
    [
        ("cat", "a cat", "cats"),
        ("apple", "an apple", "apples"),
        ("unicorn", "a unicorn", "unicorns"),
        ("umbrella", "an umbrella", "umbrellas"),
        ("euro banknote", "a euro banknote", "euro banknotes"),
        ("butterfly", "a butterfly", "butterflies"),
        ("toy", "a toy", "toys"),
        ("fox", "a fox", "foxes"),
        ("church", "a church", "churches"),
        ("cactus", "a cactus", "cactuses"),
        ("fish", "a fish", "fish"),
        ("mouse", "a mouse", "mice"),
        ("snowman", "a snowman", "snowmen"),
        ("glass of milk", "a glass of milk", "glasses of milk"),
        ("sun behind cloud", "a sun behind cloud", "suns behind cloud"),
        ("scissors", "scissors", "scissorses"),
        ("bread", "bread", "breads"),
    ],
)
def test_english(name: str, one: str, many: str):
    assert with_article(name) == one
    if one != name:
        assert plural(name) == many
