"""Training of the autoregressive generator on a frozen tokenizer.

Axes: B batch, N latent tokens, K bits, L text length, Dt text width.
"""

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
        del key, train
        logits = apply(self.network, params["generator"], code[:, :-1], text, mask)
        return binary_diffusion.loss(logits, code), {
            "bit_accuracy": binary_diffusion.bit_accuracy(logits, code)
        }
