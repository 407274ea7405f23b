"""Training of the autoregressive generator on a frozen tokenizer.

Axes: B batch, N latent tokens, K bits, L text length, Dt text width.
"""

import jax
from jaxtyping import Array, Bool, Float, Key

from instella_jax.config import Config
from instella_jax.models import binary_diffusion
from instella_jax.models.ar_transformer import ArTransformer
from instella_jax.models.functional import Params, apply
from instella_jax.stages.base import Metrics
from instella_jax.stages.generator import GeneratorStage


class AutoregressiveStage(GeneratorStage):
    """The autoregressive generator with its text encoder; see `stages.Stage`."""

    kind = "ar"

    def __init__(self, config: Config):
        """Build the networks of a config whose stage is "ar"."""
        super().__init__(config, ArTransformer)

    def code_metrics(
        self,
        params: Params,
        code: Float[Array, "B N K"],
        text: Float[Array, "layers B L Dt"],
        mask: Bool[Array, "B L"],
        key: Key[Array, ""],
        train: bool,
    ) -> tuple[Float[Array, ""], Metrics]:
        """Return loss and accuracy (0 to 1) of each token's bits, given those before it."""
        seen, noise = code[:, :-1], self.config.loss.bit_noise
        if train and noise:
            rate_key, noise_key = jax.random.split(key)
            rates = jax.random.uniform(rate_key, seen.shape[:1], maxval=noise)
            seen = binary_diffusion.add_noise(
                seen, rates, jax.random.uniform(noise_key, seen.shape)
            )
        logits = apply(self.network, params["generator"], seen, text, mask)
        return binary_diffusion.loss(logits, code), {
            "bit_accuracy": binary_diffusion.bit_accuracy(logits, code)
        }
