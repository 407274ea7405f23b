"""Training of the binary-latent diffusion generator on a frozen tokenizer.

Axes: B batch, R = B * draws noisy codes, N latent tokens, K bits, L text length, Dt text width.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key

from instella_jax.config import Config
from instella_jax.models import binary_diffusion
from instella_jax.models.diffusion_transformer import DiffusionTransformer
from instella_jax.models.functional import Params, apply
from instella_jax.stages.base import Metrics
from instella_jax.stages.generator import GeneratorStage


class DiffusionStage(GeneratorStage):
    """The diffusion generator with its text encoder; see `stages.Stage`."""

    kind = "diffusion"
    sampling_settings = ("guidance", "temperature", "rho")

    def __init__(self, config: Config):
        """Build the networks of a config whose stage is "diffusion"."""
        super().__init__(config, DiffusionTransformer)

    def describe_process(self) -> dict[str, Any]:
        """Return what the network was trained to predict."""
        return {"target": self.config.loss.target}

    @property
    def draws(self) -> int:
        """How many noisy versions of a code, each at its own time, a step learns from."""
        return self.config.loss.draws

    def code_metrics(
        self,
        params: Params,
        code: Float[Array, "B N K"],
        text: Float[Array, "layers B L Dt"],
        mask: Bool[Array, "R L"],
        key: Key[Array, ""],
        train: bool,
    ) -> tuple[Float[Array, ""], Metrics]:
        """Return loss and bit accuracy (0 to 1) of codes at random times."""
        code = jnp.repeat(code, self.draws if train else 1, axis=0)
        time_key, noise_key = jax.random.split(key)
        times = self.config.loss.times
        if train:
            shift = self.config.loss.time_shift
            t = binary_diffusion.sample_times(time_key, code.shape[0], times, shift)
        else:
            # Evenly spread, for less noise in the held-out figure, and without the shift, so that
            # the figures of different shifts can be compared.
            t = binary_diffusion.spread_times(code.shape[0], times)
        z = binary_diffusion.add_noise(code, t, jax.random.uniform(noise_key, code.shape))
        f = apply(self.network, params["generator"], z, t, text, mask)
        logits = binary_diffusion.clean_logits(f, z, self.config.loss.target)
        return binary_diffusion.loss(logits, code), {
            "bit_accuracy": binary_diffusion.bit_accuracy(logits, code)
        }
