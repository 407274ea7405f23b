"""Reads captions back, written apart from the grammar, with regular expressions only."""

import re

PLACES = {
    "at the top left": ("top", "left"),
    "in the top left corner": ("top", "left"),
    "at the top right": ("top", "right"),
    "in the top right corner": ("top", "right"),
    "at the bottom left": ("bottom", "left"),
    "in the bottom left corner": ("bottom", "left"),
    "at the bottom right": ("bottom", "right"),
    "in the bottom right corner": ("bottom", "right"),
    "at the top": ("top", "middle"),
    "at the bottom": ("bottom", "middle"),
    "on the left": ("middle", "left"),
    "on the left side": ("middle", "left"),
    "on the right": ("middle", "right"),
    "on the right side": ("middle", "right"),
    "in the middle": ("middle", "middle"),
}
PLACE = "|".join(sorted(PLACES, key=len, reverse=True))
COLOUR = "white|black|gray|red|orange|yellow|green|blue|purple|pink"
RELATION = "(?:to the )?left of|(?:to the )?right of|above|below"
NUMBERS = {"a": 1, "an": 1, "two": 2, "three": 3}


def lies(place: tuple[str, str], x: float, y: float) -> bool:
    """Whether a centre may be said to lie in a cell: about a third of the picture each way."""

    def along(word: str, value: float) -> bool:
        if word == "middle":
            return 1 / 3 <= value <= 2 / 3
        return value < 0.375 if word in ("top", "left") else value > 0.625

    return along(place[0], y) and along(place[1], x)


def read(text: str, singular: dict[str, str]) -> dict:
    """What a caption claims.

    Args:
      text: the caption.
      singular: names by their plural and by themselves.

    Returns:
      "background" and "style" (None where not said), "counts" by name, "places": (name, place)
      pairs, "relations": (name, word, name), "arranged": None, "row" or "column", "size".
    """
    facts: dict = {"background": None, "style": None, "counts": {}, "places": [], "relations": []}
    facts |= {"arranged": None, "size": None}
    if found := re.search(r" in (twemoji|fluent) style$", text):
        facts["style"], text = found[1], text[: found.start()]
    for pattern in (
        rf" on an? ({COLOUR}) background$",
        rf" on ({COLOUR})$",
        rf"^an? ({COLOUR}) background with ",
    ):
        if found := re.search(pattern, text):
            facts["background"], text = found[1], text[: found.start()] + text[found.end() :]
            break
    for ending, word in ((" side by side", "row"), (" one above the other", "column")):
        if text.endswith(ending):
            facts["arranged"], text = word, text.removesuffix(ending)

    def things(phrase: str) -> str:
        number, name = phrase.split(" ", 1)
        if found := re.match(r"(large|small) ", name):
            facts["size"], name = found[1], name[found.end() :]
        assert number in NUMBERS, phrase
        assert (NUMBERS[number] == 1) == (name in singular.values()) or name == singular[name], text
        facts["counts"][singular[name]] = NUMBERS[number]
        return singular[name]

    parts = re.split(r", | and ", text)
    # "two cats, one at the top and one at the bottom"
    if len(parts) > 1 and all(part.startswith("one ") for part in parts[1:]):
        name = things(parts[0])
        facts["places"] = [(name, PLACES[part.removeprefix("one ")]) for part in parts[1:]]
        assert len(facts["places"]) == facts["counts"][name]
        return facts
    subject = None
    for part in parts:
        if found := re.search(rf"(?:^| )({RELATION}) ", part):
            left, right = part[: found.start()], part[found.end() :]
            # "a cat above a dog and left of a pizza": the subject stays.
            subject = things(left) if left else subject
            word = found[1].removeprefix("to the ")
            facts["relations"].append((subject, word, things(right)))
        elif found := re.search(rf" ({PLACE})$", part):
            facts["places"].append((things(part[: found.start()]), PLACES[found[1]]))
        else:
            things(part)
    return facts
