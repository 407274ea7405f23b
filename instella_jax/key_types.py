"""The kinds of values that keys of the configs take."""

import dataclasses
import math
from typing import Any

INT32 = 2**31 - 1


@dataclasses.dataclass(frozen=True)
class Key:
    """What a key means, and the values it takes.

    Attributes:
      meaning: in a line.
      kind: type of the value: bool, int, float or str; of each item where `many`.
      low: least number, or None.
      high: greatest number, or None.
      above: whether `low` itself is left out.
      below: whether `high` itself is left out.
      also: values that are taken beside the range.
      choices: all values, where they are few.
      many: whether it is a tuple of values.
      length: of the tuple, or None for any.
      path: whether it names a file or folder, or several with commas between them.
    """

    meaning: str
    kind: type
    low: float | None = None
    high: float | None = None
    above: bool = False
    below: bool = False
    also: tuple[Any, ...] = ()
    choices: tuple[Any, ...] = ()
    many: bool = False
    length: int | None = None
    path: bool = False

    @property
    def numeric(self) -> bool:
        """Whether values are numbers."""
        return self.kind in (int, float)

    def takes(self, value: Any) -> bool:
        """Tell whether a value is one that the key takes."""
        if any(value is other or value == other for other in self.also):
            return True
        if self.many and isinstance(value, list | tuple):
            fits = self.length in (None, len(value))
            return fits and all(self._takes_one(item) for item in value)
        return not self.many and self._takes_one(value)

    def _takes_one(self, value: Any) -> bool:
        kinds = (int, float) if self.kind is float else (self.kind,)
        if type(value) not in kinds:  # a truth value is no number
            return False
        if self.choices:
            return value in self.choices
        if not self.numeric:
            return True
        over = self.low is None or (value > self.low if self.above else value >= self.low)
        under = self.high is None or (value < self.high if self.below else value <= self.high)
        return over and under and math.isfinite(value)

    @property
    def expected(self) -> str:
        """The values in words."""
        if self.choices:
            return f"one of {', '.join(repr(choice) for choice in self.choices)}"
        if self.kind is bool:
            return "True or False"
        text = {int: "a whole number", float: "a number", str: "a text"}[self.kind]
        text = "a path" if self.path else text
        if self.numeric:
            text = self._range() or text
        if self.many:
            count = "" if self.length is None else f"{self.length} "
            noun = "texts" if self.kind is str else f"whole numbers, each {text}"
            text = f"{count}{noun}"
        if self.also:
            others = ", ".join(repr(value) for value in self.also)
            text = f"{others}, or {text}"
        return text

    def _range(self) -> str:
        """Return the range of a number in words, "" without one."""
        low, high = (None if n is None else f"{n:,}" for n in (self.low, self.high))
        if self.high == INT32:
            high = None
        if low is None:
            return ""
        if high is None:
            return f"more than {low}" if self.above else f"at least {low}"
        if not self.above and not self.below:
            return f"{low} to {high}"
        start = f"more than {low}" if self.above else f"{low} or more"
        return f"{start}, {'below' if self.below else 'up to'} {high}"


def whole(meaning: str, low: int, high: int = INT32, **options: Any) -> Key:
    """Return the entry of a whole number."""
    return Key(meaning, int, low, high, **options)


def real(meaning: str, low: float, high: float | None = None, **options: Any) -> Key:
    """Return the entry of a finite number."""
    return Key(meaning, float, low, high, **options)


def share(meaning: str, **options: Any) -> Key:
    """Return the entry of a share from 0 to 1."""
    return Key(meaning, float, 0, 1, **options)


def switch(meaning: str) -> Key:
    """Return the entry of a truth value."""
    return Key(meaning, bool)


def text(meaning: str, **options: Any) -> Key:
    """Return the entry of a text."""
    return Key(meaning, str, **options)


def path(meaning: str) -> Key:
    """Return the entry of a path; "" is none."""
    return Key(meaning, str, path=True)


def choice(meaning: str, *values: Any) -> Key:
    """Return the entry of one of a few values."""
    return Key(meaning, type(values[0]), choices=values)
