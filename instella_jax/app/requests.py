"""What may be asked for, checked before anything is computed."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from instella_jax.errors import UserError

SEEDS = 2**32


class BadField(UserError):
    """Raised for a value that is not taken.

    Attributes:
      field: its name.
    """

    def __init__(self, field: str, sentence: str):
        """Name the value and say what is wrong with it."""
        super().__init__(sentence)
        self.field = field


@dataclasses.dataclass(frozen=True)
class Limits:
    """How much one request, and all that wait, may ask for.

    Attributes:
      prompt: characters of a prompt or a negative prompt.
      pictures: pictures of a request.
      steps: of the diffusion sampler.
      guidance_scale: of guidance, in diffusers' count.
      temperature: of the guided logits.
      zoom: sides of a picture in sides that the model was trained at.
      waiting: pictures that wait.
      batch: pictures sampled at a time.
      upload_bytes: of a file.
      upload_pixels: of a picture in a file.
    """

    prompt: int = 1_000
    pictures: int = 10
    steps: int = 100
    guidance_scale: float = 30.0
    temperature: float = 4.0
    zoom: int = 2
    waiting: int = 64
    batch: int = 8
    upload_bytes: int = 20 * 2**20
    upload_pixels: int = 50_000_000


@dataclasses.dataclass(frozen=True)
class Request:
    """Pictures of one prompt.

    Attributes:
      model: name of the model; "" for the first.
      prompt: what they show.
      negative_prompt: what guidance leads away from.
      pictures: how many; picture j has the seed `seed` + j.
      seed: of the first one.
      height: in pixels; 0 for the size that the model was trained at.
      width: likewise.
      steps: of the diffusion sampler.
      guidance_scale: diffusers' w; None for the model's own.
      temperature: of the guided logits; None for the model's own.
      rho: exponent of the diffusion sampler's times; None for the model's own.
      protocol: how its bits are sampled between steps.
    """

    prompt: str
    model: str = ""
    negative_prompt: str = ""
    pictures: int = 1
    seed: int = 0
    height: int = 0
    width: int = 0
    steps: int = 20
    guidance_scale: float | None = None
    temperature: float | None = None
    rho: float | None = None
    protocol: int = 1

    def check(self, limits: Limits, names: Mapping[str, str] | None = None) -> None:
        """Check types and ranges, whoever has filled the fields in.

        Args:
          limits: what is allowed.
          names: what fields are called where they come from, if otherwise than here.

        Raises:
          BadField: a value is not taken.
        """
        names = names or {}
        for field in ("prompt", "negative_prompt"):
            _text(names.get(field, field), getattr(self, field), limits.prompt)
        if not self.prompt.strip():
            name = names.get("prompt", "prompt")
            raise BadField(name, f"{name} is empty: say what the picture shows")
        for field, least, most in (
            ("pictures", 1, limits.pictures),
            ("seed", 0, SEEDS - limits.pictures),
            ("steps", 1, limits.steps),
            ("protocol", 1, 2),
        ):
            _whole(names.get(field, field), getattr(self, field), least, most)
        for field, least, most in (
            ("guidance_scale", 0.0, limits.guidance_scale),
            ("temperature", 0.0, limits.temperature),
            ("rho", 0.01, 100.0),
        ):
            if (value := getattr(self, field)) is not None:
                _real(names.get(field, field), value, least, most)


def _text(name: str, value: Any, most: int) -> None:
    if not isinstance(value, str):
        raise BadField(name, f"{name} is a {type(value).__name__}: expected a text")
    if len(value) > most:
        raise BadField(name, f"{name} has {len(value):,} characters, at most {most:,} are taken")
    if any("\ud800" <= letter <= "\udfff" for letter in value):
        raise BadField(name, f"{name} is not UTF-8: give it as UTF-8 text")


def _whole(name: str, value: Any, least: int, most: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise BadField(
            name, f"{name} is {_shown(value)}: expected a whole number from {least} to {most}"
        )


def _real(name: str, value: Any, least: float, most: float) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or not least <= value <= most:
        raise BadField(
            name, f"{name} is {_shown(value)}: expected a number from {least:g} to {most:g}"
        )


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:39]}…"
