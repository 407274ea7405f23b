"""Networks as functions of their parameters: making them, their shapes, applying them."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key, Shaped

from instella_jax.errors import UserError
from instella_jax.models.ar_transformer import ArTransformer
from instella_jax.models.diffusion_transformer import DiffusionTransformer
from instella_jax.models.discriminator import Discriminator
from instella_jax.models.layers import Params
from instella_jax.models.lora import Adapters
from instella_jax.models.olmo import Olmo
from instella_jax.models.tokenizer import TokenizerNetwork
from instella_jax.models.vgg import MIN_SIDE, Lpips
from instella_jax.models.vision_heads import AlignmentHead, FeatureDiscriminator
from instella_jax.models.vision_transformer import VisionTransformer

Network = (
    TokenizerNetwork
    | DiffusionTransformer
    | ArTransformer
    | Olmo
    | Discriminator
    | Lpips
    | VisionTransformer
    | AlignmentHead
    | FeatureDiscriminator
)
# Convolutions, and what only losses look through.
_Unsplit = (
    Adapters | Discriminator | Lpips | VisionTransformer | AlignmentHead | FeatureDiscriminator
)
# What can be trained.
Trainable = Network | Adapters


def example_inputs(network: Network) -> tuple[Shaped[Array, "..."], ...]:
    """Return arguments for the network's call, one row of zeros each."""
    if isinstance(network, TokenizerNetwork):
        side = network.config.multiple
        return (jnp.zeros((1, side, side, 3)),)
    if isinstance(network, Discriminator):
        return (jnp.zeros((1, MIN_SIDE, MIN_SIDE, 3)),)
    if isinstance(network, VisionTransformer):
        side = network.config.patch_size
        return (jnp.zeros((1, side, side, 3)),)
    if isinstance(network, AlignmentHead):
        return (jnp.zeros((1, 1, 1, network.width)),)
    if isinstance(network, FeatureDiscriminator):
        return (jnp.zeros((network.heads, 1, 1, 1, network.features)),)
    if isinstance(network, Lpips):
        return (jnp.zeros((1, MIN_SIDE, MIN_SIDE, 3)),) * 2
    if isinstance(network, Olmo):
        return jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1), jnp.int32)
    z = jnp.zeros((1, network.num_tokens, network.bits))
    text = jnp.zeros((network.num_layers, 1, 1, network.text_width))
    mask = jnp.ones((1, 1), jnp.int32)
    if isinstance(network, ArTransformer):
        return z[:, 1:], text, mask
    return z, jnp.zeros(1), text, mask


def init_params(network: Trainable, key: Key[Array, ""]) -> Params:
    """Make the parameters of a network or of adapters, with their logical axes."""
    if isinstance(network, Adapters):
        return network.init(key)["params"]
    return network.init(key, *example_inputs(network))["params"]


def abstract_params(network: Trainable) -> Params:
    """Return shapes of what `init_params` makes, with logical axes; nothing is allocated."""
    # A key made outside would be computed, and compiled for that.
    return jax.eval_shape(lambda: init_params(network, jax.random.key(0)))


def apply(network: Network, params: Params, *inputs: Any, method: str | None = None) -> Any:
    """Call a network, or one of its methods, with given parameters."""
    return network.apply({"params": params}, *inputs, method=method)


def tensor_sizes(network: Trainable) -> dict[str, int]:
    """Return numbers of a network that the mesh axis `tensor` must divide, by what they count.

    An MLP of a width that is a multiple of the heads is split where these are. Adapters go by the
    network that they adapt, and neither convolutions nor what only losses look through is split.
    """
    if isinstance(network, _Unsplit):
        return {}
    if isinstance(network, TokenizerNetwork):
        sizes = network.config
        return {"encoder heads": sizes.encoder_heads, "decoder heads": sizes.decoder_heads}
    if isinstance(network, Olmo):
        sizes = network.config
        return {
            "heads": sizes.num_attention_heads,
            "key and value heads": sizes.num_key_value_heads,
            "hidden units of the MLP": sizes.intermediate_size,
        }
    return {"heads": network.num_heads}


def check_tensor(networks: Mapping[str, Trainable], mesh: jax.sharding.Mesh) -> None:
    """Check that networks, by part, can be split over the mesh axis `tensor`.

    Raises:
      UserError: naming what does not split, and the sizes of the axis that would do.
    """
    parts = mesh.shape["tensor"]
    found = {
        f"{number} {what} of the {part}": number
        for part, network in networks.items()
        for what, number in tensor_sizes(network).items()
    }
    uneven = [name for name, number in found.items() if number % parts]
    if uneven:
        common = math.gcd(*found.values())
        fitting = [n for n in range(1, common + 1) if common % n == 0]
        raise UserError(
            f"{', '.join(uneven)} do not split into mesh.tensor={parts} parts: use one of {fitting}"
        )
