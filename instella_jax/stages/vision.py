"""The frozen network that losses of the tokenizer look through."""

from pathlib import Path

from instella_jax.config import Config
from instella_jax.errors import UserError
from instella_jax.models.layers import Execution
from instella_jax.models.vision_transformer import VisionTransformer
from instella_jax.weights.vision_folder import make_vision


def vision_network(losses: Config, run: Execution) -> VisionTransformer | None:
    """Return the network in the folder `loss.vision`, None where no loss looks through it.

    Args:
      losses: the section `loss` of a tokenizer's config.
      run: how it is computed.

    Raises:
      UserError: there is no such network, or the discriminator looks at more blocks than it has.
    """
    judge = losses.adversarial.weight and losses.adversarial.kind == "features"
    names = [f"loss.{name}" for name in ("alignment", "features") if losses[name].weight]
    names += ["loss.adversarial.kind=features"] if judge else []
    if not names:
        return None
    if not losses.vision:
        raise UserError(
            f"{names[0]} looks through a frozen network: give the folder of a Dinov2Model of "
            "transformers as --config.loss.vision=FOLDER"
        )
    network = make_vision(Path(losses.vision), run)
    blocks = network.config.num_hidden_layers
    if judge and losses.adversarial.heads > blocks:
        raise UserError(
            f"loss.adversarial.heads is {losses.adversarial.heads}, and {losses.vision} has "
            f"{blocks} blocks: expected no more heads than these"
        )
    return network
