"""What training asks of the bits themselves, and how healthy they are.

Axes: B batch, N latent tokens, K bits.
"""

import jax
import jax.numpy as jnp
from jax.scipy.special import entr
from jaxtyping import Array, Float

from instella_jax.models.quantizers import code_loss

__all__ = ["balance_loss", "code_health", "code_loss", "entropy_loss"]

_BIT = 0.6931471805599453  # ln 2


def binary_entropy(p: Float[Array, "*axes"]) -> Float[Array, "*axes"]:
    """Return the entropy of a coin in bits, 0 to 1."""
    return (entr(p) + entr(1.0 - p)) / _BIT


def entropy_loss(logits: Float[Array, "B N K"]) -> Float[Array, ""]:
    """Return the mean entropy of each bit, 0 to 1: small when every bit is sure of itself."""
    return jnp.mean(binary_entropy(_probabilities(logits)))


def balance_loss(logits: Float[Array, "B N K"]) -> Float[Array, ""]:
    """Return 1 minus the mean entropy of the bits' use in the batch: 0 when each is on in half."""
    return 1.0 - jnp.mean(binary_entropy(_probabilities(logits).mean(0)))


def _probabilities(logits: Float[Array, "B N K"]) -> Float[Array, "B N K"]:
    # At 0 and 1 the entropy has no gradient.
    return jnp.clip(jax.nn.sigmoid(logits), 1e-6, 1.0 - 1e-6)


def code_health(code: Float[Array, "B N K"]) -> dict[str, Float[Array, ""]]:
    """Return how the bits of a batch of codes are used.

    "bits_on" is the share that is on; "bits_entropy" the mean entropy of each bit's use, 1 at best;
    "dead_bits" the share of bits that are the same in the whole batch; "pictures_differ" and
    "tokens_differ" the shares of bits in which a picture differs from the next one of the batch,
    and a token from the next one of its picture: 1/2 for bits at random.
    """
    use = code.mean(0)
    return {
        "bits_on": code.mean(),
        "bits_entropy": binary_entropy(use).mean(),
        "dead_bits": jnp.mean((use == 0) | (use == 1)),
        "pictures_differ": jnp.mean(code != jnp.roll(code, 1, axis=0)),
        "tokens_differ": jnp.abs(code[:, 1:] - code[:, :-1]).sum() / max(1, code[:, 1:].size),
    }
