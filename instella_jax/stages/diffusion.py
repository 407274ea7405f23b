"""Training of the binary-latent diffusion generator on a frozen tokenizer.

Axes: B batch, N latent tokens, K bits, L text length.
"""

from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from instella_jax import binary_diffusion
from instella_jax.errors import UserError
from instella_jax.models.diffusion_transformer import DiffusionTransformer
from instella_jax.stages.generator import GeneratorStage

Params = Any


class DiffusionStage(GeneratorStage):
    """The diffusion generator with its text encoder; see `stages.Stage`."""

    kind = "diffusion"

    def __init__(self, config: ConfigDict):
        """Builds the networks of a config whose stage is "diffusion"."""
        super().__init__(config, DiffusionTransformer)
        for key, known in (
            ("target", binary_diffusion.TARGETS),
            ("times", binary_diffusion.TIME_DISTRIBUTIONS),
        ):
            if config.loss[key] not in known:
                raise UserError(f"loss.{key} is {config.loss[key]!r}: expected one of {known}")

    def init_generator(self, key: jax.Array) -> Params:
        """Parameters of the generator alone, with logical axes."""
        m = self.network
        code = jnp.zeros((1, m.num_tokens, m.bits))
        text = jnp.zeros((m.num_layers, 1, 1, m.text_width))
        return m.init(key, code, jnp.zeros(1), text, jnp.ones((1, 1), bool))["params"]

    def code_metrics(
        self, params: Params, code: jax.Array, text: jax.Array, mask: jax.Array, key: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:  # fmt: skip
        """Loss and bit accuracy (0 to 1) of codes [B, N, K] at random times."""
        time_key, noise_key = jax.random.split(key)
        t = binary_diffusion.sample_times(time_key, code.shape[0], self.config.loss.times)
        z = binary_diffusion.add_noise(code, t, jax.random.uniform(noise_key, code.shape))
        f = self.network.apply({"params": params["generator"]}, z, t, text, mask)
        logits = binary_diffusion.clean_logits(f, z, self.config.loss.target)
        return binary_diffusion.bit_loss(logits, code), {
            "bit_accuracy": binary_diffusion.bit_accuracy(logits, code) / 100.0
        }
