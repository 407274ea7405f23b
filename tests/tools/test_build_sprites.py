import json
import re

import pytest
from PIL import Image, ImageDraw

from tools import build_sprites


def _svg(colour: str) -> str:
    return f'<svg><path fill="{colour}"/></svg>'


def _draw(svg: str, side: int) -> Image.Image:
    """Stands in for the SVG renderer: a disc of the first colour."""
    colour = re.search(r'fill="([^"]+)"', svg)
    assert colour
    image = Image.new("RGBA", (64, 64))
    margin = (64 - side) // 2 + 4
    ImageDraw.Draw(image).ellipse((margin, margin, 63 - margin, 63 - margin), fill=colour[1])
    return image


@pytest.fixture
def modules(tmp_path, monkeypatch):
    """Three packages of a few emoji, laid out like the real ones."""
    monkeypatch.setattr(build_sprites, "_render", _draw)
    monkeypatch.setattr(build_sprites, "CORE", ("cat", "red heart"))
    emoji = [
        ("1F431", "cat face", 3, "gold"),
        ("1F408", "cat", 3, "olive"),
        ("2764", "red heart", 0, "red"),
        ("1F98A", "fox", 3, "gold"),
        ("1F436", "dog face", 3, "brown"),
        ("27A1", "right arrow", 8, "navy"),
        ("1F697", "automobile", 5, "teal"),
        ("1F3C4", "person surfing", 1, "lime"),
    ]
    twemoji = tmp_path / "@twemoji" / "svg"
    fluent = tmp_path / "@iconify-json" / "fluent-emoji-flat"
    base = tmp_path / "emojibase-data"
    for folder in (twemoji, fluent, base / "en", base / "meta"):
        folder.mkdir(parents=True)
    data = [{"label": la, "hexcode": c, "group": g, "tags": [la]} for c, la, g, _ in emoji]
    (base / "en" / "data.json").write_text(json.dumps(data))
    groups = {"0": "smileys-emotion", "1": "people-body", "3": "animals-nature", "8": "symbols"}
    (base / "meta" / "groups.json").write_text(json.dumps({"groups": groups}))
    chars, icons = {}, {}
    for code, label, _, colour in emoji:
        (twemoji / f"{code.lower()}.svg").write_text(_svg(colour))
        if label != "automobile":
            chars[code.lower()] = label.replace(" ", "-")
            icons[chars[code.lower()]] = {"body": f'<path fill="{colour}"/>'}
    (fluent / "chars.json").write_text(json.dumps(chars))
    (fluent / "icons.json").write_text(json.dumps({"icons": icons}))
    return tmp_path


def test_concepts_are_joined_and_selected(modules):
    index, files = build_sprites.build(modules, quality=80)
    concepts = {concept["name"]: concept for concept in index["concepts"]}
    # The cat's face takes the cat's name; the fox looks like it; the arrow has a word of relations;
    # the car has one style only; surfing is no thing.
    assert list(concepts) == ["cat", "red heart", "dog"]
    assert concepts["cat"]["code"] == "1f431"
    assert concepts["red heart"]["hidden"] == {"twemoji": ["red"], "fluent": ["red"]}
    assert set(files) == {
        f"{style}/{concept['code']}.webp"
        for style in ("twemoji", "fluent")
        for concept in concepts.values()
    }


def test_a_missing_core_concept_stops_the_build(modules, monkeypatch):
    monkeypatch.setattr(build_sprites, "CORE", ("cat", "car"))
    with pytest.raises(SystemExit, match="car"):
        build_sprites.build(modules, quality=80)
