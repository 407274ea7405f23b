"""The combinations that are held out of training.

No training scene contains one, every held-out scene contains at least one, and each of their parts
is still seen in training. The choice depends on the names alone, not on seeds or on which concepts
a data set uses, so that models trained on different sets can be compared.
"""

import functools

from instella_jax.data.scenes.scene import Placed, Scene, Stream
from instella_jax.data.scenes.sprites import BACKGROUNDS, catalogue

RELATIONS = ("left of", "right of", "above", "below")
CONVERSE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


def _holds(a: Placed, word: str, b: Placed) -> bool:
    """Return whether the relation is true in the widest sense: any distance along its axis."""
    distance = {"left of": b.x - a.x, "right of": a.x - b.x, "above": b.y - a.y, "below": a.y - b.y}
    return distance[word] > 0


def _hash_of(*words: str) -> int:
    # The salt was chosen so that the prompts of the README are not held out.
    return Stream("held out", *words).below(1 << 20)


@functools.cache
def heldout_background(name: str) -> str:
    """Return the one background on which this object is never seen in training."""
    hidden = catalogue()[name].hidden.values()
    visible = [word for word in BACKGROUNDS if not any(word in words for words in hidden)]
    return visible[_hash_of("background", name) % len(visible)]


@functools.cache
def heldout_count(name: str) -> int | None:
    """Return the number (2 or 3) in which this object is never seen in training; None for half of
    them."""
    if not catalogue()[name].countable:
        return None
    return {0: 2, 1: 3}.get(_hash_of("count", name) % 4)


@functools.lru_cache(maxsize=1 << 20)
def heldout_relation(a: str, word: str, b: str) -> bool:
    """Return whether "a word b", such as ("cat", "left of", "dog"), is never true in training: 1 in
    16."""
    if word in ("right of", "below"):
        a, word, b = b, CONVERSE[word], a
    return a != b and _hash_of("relation", a, word, b) % 16 == 0


@functools.lru_cache(maxsize=4096)
def heldout_partners(a: str, others: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    """Return all (relation, b) that are held out for an object, b out of `others`."""
    return tuple((word, b) for word in RELATIONS for b in others if heldout_relation(a, word, b))


def heldout_facts(scene: Scene) -> list[str]:
    """Return the held-out combinations that are true of a scene, in words."""
    facts = [
        f"{name} on {scene.background}"
        for name in scene.counts
        if heldout_background(name) == scene.background
    ]
    facts += [f"{n} {name}" for name, n in scene.counts.items() if heldout_count(name) == n]
    facts += [
        f"{a.name} {word} {b.name}"
        for a in scene.objects
        for b in scene.objects
        for word in ("left of", "above")
        if a.name != b.name and heldout_relation(a.name, word, b.name) and _holds(a, word, b)
    ]
    return facts
