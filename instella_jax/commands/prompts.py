"""Prompts from arguments, files and standard input: texts or JSON, one a line."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from instella_jax.errors import UserError

MAX_PROMPTS = 100_000


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A prompt, and what a line of JSON may say beside it; None is what holds for all.

    Attributes:
      prompt: the text.
      negative_prompt: what guidance leads away from.
      seed: of its first picture.
      height: of the picture in pixels.
      width: likewise.
    """

    prompt: str
    negative_prompt: str | None = None
    seed: int | None = None
    height: int | None = None
    width: int | None = None


_KINDS = {
    field.name: str if "prompt" in field.name else int for field in dataclasses.fields(Prompt)
}


def read_prompts(path: str) -> list[Prompt]:
    """Read a file, "-" for standard input: a prompt a line, or a JSON object a line.

    Empty lines are left out.

    Raises:
      UserError: it cannot be read, has no prompt or too many, or a line is not as expected.
    """
    where = "standard input" if path == "-" else f"prompt file {path}"
    try:
        data = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
        text = data.decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"{where} cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where} cannot be read as UTF-8 ({error.reason} at byte {error.start}): save it as "
            "UTF-8"
        ) from None
    lines = [(number, line.strip()) for number, line in enumerate(text.splitlines(), 1)]
    found = [_prompt(line, f"line {number} of {where}") for number, line in lines if line]
    if not found:
        raise UserError(f"{where} is empty: expected one prompt a line")
    if len(found) > MAX_PROMPTS:
        raise UserError(f"{where} has {len(found)} prompts, at most {MAX_PROMPTS}")
    return found


def _prompt(line: str, where: str) -> Prompt:
    if not line.startswith("{"):
        return Prompt(line)
    try:
        values: dict[str, Any] = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where} begins with a brace and is not JSON ({error})") from None
    if unknown := sorted(values.keys() - _KINDS.keys()):
        raise UserError(f"{where} has the key {unknown[0]!r}: expected {', '.join(_KINDS)}")
    if "prompt" not in values:
        raise UserError(f'{where} has no prompt: expected {{"prompt": "...", "seed": 0}}')
    for name, value in values.items():
        if not isinstance(value, _KINDS[name]) or isinstance(value, bool):
            kind = "a text" if _KINDS[name] is str else "a whole number"
            raise UserError(f"{where}: {name} is {value!r}, expected {kind}")
    return Prompt(**values)
