"""What is asked of a sampler: how prompts are sampled, and each picture that is to be made."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

from instella_jax.config import Config
from instella_jax.config_keys import check_value


@dataclasses.dataclass(frozen=True)
class Options:
    """How prompts are sampled; the defaults are the published ones.

    Attributes:
      negative_prompt: what guidance leads away from; "" is the unconditional prompt.
      images_per_prompt: pictures of each prompt; picture j has the seed `seed` + j.
      seed: of the first picture of every prompt.
      steps: of the diffusion sampler.
      guidance: g in (1 + g) conditional - g unconditional; 0 is none. g is the scale of other
        systems less 1.
      temperature: of the guided logits; 0 takes the likelier bit.
      rho: exponent of the schedule of times.
      protocol: how bits are sampled between steps, 1 or 2 (the posterior).
      height: of the pictures in pixels; 0 is the size that the model was trained at.
      width: likewise.
      batch_size: pictures sampled at a time.
      kernel: what samples the bits, see `kernels.binary_sampling.resolve`.
    """

    negative_prompt: str = ""
    images_per_prompt: int = 1
    seed: int = 0
    steps: int = 20
    guidance: float = 7.5
    temperature: float = 1.0
    rho: float = 1.0
    protocol: int = 1
    height: int = 0
    width: int = 0
    batch_size: int = 16
    kernel: str = "auto"

    def __post_init__(self) -> None:
        """Check ranges.

        Raises:
          UserError: a value is out of range.
        """
        for field in dataclasses.fields(self):
            name = field.name
            check_value(f"sample.{name}", getattr(self, name), called=name)


def options_from_config(config: Config) -> Options:
    """Read the options out of a config's `sample` section."""
    names = {field.name for field in dataclasses.fields(Options)}
    return Options(**{name: config[name] for name in names if name in config})


class Request(NamedTuple):
    """A picture to sample.

    Attributes:
      prompt: what it shows.
      negative_prompt: what guidance leads away from; "" is the unconditional prompt.
      seed: of its random numbers.
    """

    prompt: str
    negative_prompt: str = ""
    seed: int = 0


def requests_of(prompts: str | Sequence[str], options: Options) -> list[Request]:
    """Return the pictures that options ask for, those of a prompt together.

    >>> [(one.prompt, one.seed) for one in requests_of(["a", "b"], Options(images_per_prompt=2))]
    [('a', 0), ('a', 1), ('b', 0), ('b', 1)]
    """
    return [
        Request(prompt, options.negative_prompt, options.seed + number)
        for prompt in ([prompts] if isinstance(prompts, str) else prompts)
        for number in range(options.images_per_prompt)
    ]
