"""Articles and plurals of object names such as "apple", "glass of milk" or "scissors"."""

import re

_PREPOSITIONS = re.compile(r" (?:with|without|of|in|on|behind|from|under|at|for) ")
_IRREGULAR = {
    "child": "children",
    "die": "dice",
    "elf": "elves",
    "foot": "feet",
    "goose": "geese",
    "knife": "knives",
    "leaf": "leaves",
    "mango": "mangoes",
    "mosquito": "mosquitoes",
    "mouse": "mice",
    "ox": "oxen",
    "person": "people",
    "potato": "potatoes",
    "scarf": "scarves",
    "sheaf": "sheaves",
    "superhero": "superheroes",
    "tomato": "tomatoes",
    "tooth": "teeth",
    "volcano": "volcanoes",
    "wolf": "wolves",
}
_SAME = {"bison", "deer", "fish", "blowfish", "jellyfish", "moose", "sheep", "shrimp", "squid"}
_MASS = frozenset(
    "bacon badminton bread broccoli butter coral food fruit garlic hockey ice lacrosse luggage mate"
    " meat milk money oden pasta poo popcorn rice root sake salad salt soap spaghetti sushi tennis"
    " water wood yarn".split()
)
_PLURAL_ONLY = {"skis"}
_SINGULAR_IN_S = re.compile(r"(?:ss|us|is|os)$|^(?:lens|gas)$")
# "a unicorn", "a euro banknote": a vowel in writing only.
_AN = re.compile(r"^(?!uni|us|ut|uk|eu|ewe|one\b)[aeiou]|^hour")


def head(name: str) -> str:
    """Return the part that takes the plural: "glass" of "glass of milk"."""
    return _PREPOSITIONS.split(name, maxsplit=1)[0]


def is_countable(name: str) -> bool:
    """Return whether "a name" and "two names" are English: not for "bread" or "scissors"."""
    noun = head(name).split()[-1]
    if noun in _MASS or noun in _PLURAL_ONLY:
        return False
    return not noun.endswith("s") or bool(_SINGULAR_IN_S.search(noun))


def with_article(name: str) -> str:
    """Return "a cat", "an apple", "a unicorn"; "scissors" as it is."""
    if not is_countable(name):
        return name
    return f"{'an' if _AN.match(name) else 'a'} {name}"


def plural(name: str) -> str:
    """Return "cats", "butterflies", "glasses of milk"."""
    first = head(name)
    *before, noun = first.split()
    if noun in _SAME:
        many = noun
    elif noun in _IRREGULAR:
        many = _IRREGULAR[noun]
    elif re.search(r"(?:^|[a-z])man$", noun):
        many = noun[:-3] + "men"
    elif re.search(r"(?:s|x|z|ch|sh)$", noun):
        many = noun + "es"
    elif re.search(r"[^aeiou]y$", noun):
        many = noun[:-1] + "ies"
    else:
        many = noun + "s"
    return " ".join([*before, many]) + name[len(first) :]
