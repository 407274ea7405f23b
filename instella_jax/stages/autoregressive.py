"""Training of the autoregressive generator on a frozen tokenizer.

Axes: B batch, N latent tokens, K bits, L text length.
"""

import jax

from instella_jax.config import Config
from instella_jax.models import binary_diffusion
from instella_jax.models.ar_transformer import ArTransformer
from instella_jax.models.functional import Params, apply
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
        code: jax.Array,
        text: jax.Array,
        mask: jax.Array,
        key: jax.Array,
        train: bool,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Return cross-entropy and accuracy (0 to 1) of each token's bits given those before it."""
        del key, train
        logits = apply(self.network, params["generator"], code[:, :-1], text, mask)
        return binary_diffusion.loss(logits, code), {
            "bit_accuracy": binary_diffusion.bit_accuracy(logits, code)
        }
