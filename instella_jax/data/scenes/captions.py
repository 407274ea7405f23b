"""Captions: a small grammar that says only what is true of a scene.

caption    = things | things GROUND | "a" colour "background with" things
things     = "a cat" | "two cats" | "a cat" PLACE | "a cat" RELATION "a dog" | ...
PLACE      = "at the top left" | "in the top left corner" | "in the middle" | ...
RELATION   = "to the left of" | "left of" | "above" | ...
GROUND     = "on a blue background" | "on blue"
"""

from collections.abc import Callable, Sequence

from instella_jax.data.scenes.scene import Placed, Scene, Stream, relation
from instella_jax.data.scenes.sprites import catalogue

NUMBERS = {2: "two", 3: "three"}
_RELATION_WORDS = {
    "left of": ("to the left of", "left of"),
    "right of": ("to the right of", "right of"),
    "above": ("above",),
    "below": ("below",),
}
_STYLE_WORDS = {"twemoji": "in twemoji style", "fluent": "in fluent style"}


def _article(word: str) -> str:
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"


def place_words(place: tuple[str, str], *, long: bool = False) -> str:
    """Return words for a cell of `Placed.place`: "at the top left", or with `long` "in the ...
    corner"."""
    row, column = place
    if place == ("middle", "middle"):
        return "in the middle"
    if row == "middle":
        return f"on the {column} side" if long else f"on the {column}"
    if column == "middle":
        return f"at the {row}"
    return f"in the {row} {column} corner" if long else f"at the {row} {column}"


def _groups(stream: Stream, scene: Scene) -> list[list[Placed]]:
    """Return the objects by name, the groups in random order."""
    names = list(scene.counts)
    ordered = []
    while names:
        ordered.append(names.pop(stream.below(len(names))))
    return [[placed for placed in scene.objects if placed.name == name] for name in ordered]


def _things(group: Sequence[Placed]) -> str:
    concept = catalogue()[group[0].name]
    return concept.singular if len(group) == 1 else f"{NUMBERS[len(group)]} {concept.plural}"


def _join(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def listed(stream: Stream, scene: Scene) -> str:
    """Return "two red hearts and a cat"."""
    return _join([_things(group) for group in _groups(stream, scene)])


def sized(stream: Stream, scene: Scene) -> str | None:
    """Return "a large cat": of a single object."""
    if len(scene.objects) != 1 or not catalogue()[scene.objects[0].name].countable:
        return None
    size = "large" if scene.objects[0].large else "small"
    return f"a {size} {scene.objects[0].name}"


def placed(stream: Stream, scene: Scene) -> str | None:
    """Return "a cat at the top left and a dog in the middle", "two cats, one at the top and
    ..."."""
    groups = _groups(stream, scene)
    long = len(scene.objects) < 3 and stream.chance(50)
    places = [[place_words(thing.place, long=long) for thing in group] for group in groups]
    if len(groups) == 1 and len(groups[0]) > 1:
        if len(set(places[0])) < len(places[0]):
            return None
        return f"{_things(groups[0])}, " + _join([f"one {words}" for words in places[0]])
    if any(len(group) > 1 for group in groups):
        return None
    return _join(
        [f"{_things(group)} {words[0]}" for group, words in zip(groups, places, strict=True)]
    )


def related(stream: Stream, scene: Scene) -> str | None:
    """Return "a cat to the left of a dog", "a cat above two dogs": of two groups."""
    groups = _groups(stream, scene)
    if len(groups) != 2:
        return None
    word = _group_relation(groups[0], groups[1])
    if word is None:
        return None
    return f"{_things(groups[0])} {stream.choice(_RELATION_WORDS[word])} {_things(groups[1])}"


def related_three(stream: Stream, scene: Scene) -> str | None:
    """Return "a cat left of a dog and above a pizza": of three different objects."""
    groups = _groups(stream, scene)
    if len(groups) != 3:
        return None
    first = _group_relation(groups[0], groups[1])
    second = _group_relation(groups[0], groups[2])
    if first is None or second is None:
        return None
    return (
        f"{_things(groups[0])} {_RELATION_WORDS[first][-1]} {_things(groups[1])}"
        f" and {_RELATION_WORDS[second][-1]} {_things(groups[2])}"
    )


def arranged(stream: Stream, scene: Scene) -> str | None:
    """Return "two cats side by side", "two cats one above the other": of two of the same."""
    groups = _groups(stream, scene)
    if len(groups) != 1 or len(groups[0]) != 2:
        return None
    word = relation(*groups[0])
    if word is None:
        return None
    how = "side by side" if word in ("left of", "right of") else "one above the other"
    return f"{_things(groups[0])} {how}"


def _group_relation(a: Sequence[Placed], b: Sequence[Placed]) -> str | None:
    """Return the relation of all in one group to all in another, None if they differ."""
    words = {relation(one, other) for one in a for other in b}
    return words.pop() if len(words) == 1 else None


Template = Callable[[Stream, Scene], "str | None"]
# With the weight of each in a hundred; those that do not fit a scene are sampled again.
TEMPLATES: tuple[tuple[Template, int], ...] = (
    (listed, 25),
    (sized, 8),
    (placed, 40),
    (related, 20),
    (related_three, 10),
    (arranged, 12),
)
_WHEEL = tuple(template for template, weight in TEMPLATES for _ in range(weight))


def caption(stream: Stream, scene: Scene, *, name_style: bool = False) -> str:
    """Sample a caption of a scene.

    Args:
      stream: randomness of the wording.
      scene: the facts.
      name_style: whether the drawing style may be named.

    Returns:
      Lower-case English of at most 30 words and commas.
    """
    text = None
    while text is None:
        text = stream.choice(_WHEEL)(stream, scene)
    kind = stream.below(100)
    if kind < 60:
        text = f"{text} on {_article(scene.background)} background"
    elif kind < 72:
        text = f"{text} on {scene.background}"
    elif kind < 85:
        text = f"{_article(scene.background)} background with {text}"
    if name_style and stream.chance(50):
        text = f"{text} {_STYLE_WORDS[scene.style]}"
    return text


def full_caption(stream: Stream, scene: Scene, *, name_style: bool = False) -> str | None:
    """Return a caption that names all objects, their number, where they are, and the background.

    Returns:
      None where the grammar cannot say where everything is.
    """
    templates = (related, placed) if stream.chance(60) else (placed, related)
    text = templates[0](stream, scene) or templates[1](stream, scene)
    if text is None:
        return None
    text = f"{text} on {_article(scene.background)} background"
    return f"{text} {_STYLE_WORDS[scene.style]}" if name_style else text
