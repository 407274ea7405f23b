"""How training makes bits of logits: the ways share one form, (logits, key) to bits with gradients.

At evaluation a bit is on where its logit is over 0, whichever way it was trained: networks, codes
and model folders do not depend on it. "FSQ", "LFQ" and "BSQ" are Mentzer et al., 2023, with two
levels a channel, Yu et al., 2023, and Zhao et al., 2024.

Axes: B batch, N latent tokens, K bits.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from instella_jax.models.binary_diffusion import Scalar

QUANTIZERS = ("bernoulli", "bsq", "lfq", "fsq")


def quantize(
    kind: str, logits: Float[Array, "B N K"], key: Key[Array, ""], temperature: Scalar
) -> Float[Array, "B N K"]:
    """Return bits of 0 and 1 in training, with the gradients of what they were rounded from.

    Args:
      kind: "bernoulli", bits at random by sigmoid(logits / temperature) with the gradient of
        sigmoid(logits); the others take the likelier bit, with the gradient of (x + 1) / 2: "lfq"
        of x = logits, "fsq" of x = tanh(logits), "bsq" of x = sqrt(K) logits / |logits|, the
        token's direction.
      logits: of the bits.
      key: a random key, of "bernoulli" alone.
      temperature: likewise.
    """
    if kind == "bernoulli":
        return sample_code(logits, key, temperature)
    if kind == "lfq":
        x = logits
    elif kind == "fsq":
        x = jnp.tanh(logits)
    elif kind == "bsq":
        x = logits * jax.lax.rsqrt(jnp.mean(jnp.square(logits), axis=-1, keepdims=True) + 1e-12)
    else:
        raise ValueError(f"unknown quantizer {kind!r}")
    soft = (x + 1) / 2
    return hard_code(logits) + soft - jax.lax.stop_gradient(soft)


def hard_code(logits: Float[Array, "B N K"]) -> Float[Array, "B N K"]:
    """Return the bits of the code at evaluation, 1[sigmoid(logit) > 0.5], as 0 and 1."""
    return (jax.nn.sigmoid(logits) > 0.5).astype(logits.dtype)


def sample_code(
    logits: Float[Array, "B N K"], key: Key[Array, ""], temperature: Scalar
) -> Float[Array, "B N K"]:
    """Sample the bits of the code in training, with straight-through gradients.

    Args:
      logits: of the bits.
      key: a random key.
      temperature: bits are Bernoulli(sigmoid(logits / temperature)); the gradient is that of
        sigmoid(logits).

    Returns:
      bits of 0 and 1.
    """
    soft = jax.nn.sigmoid(logits)
    sampled = jax.random.bernoulli(key, jax.nn.sigmoid(logits / temperature)).astype(logits.dtype)
    return sampled + soft - jax.lax.stop_gradient(soft)


def code_loss(logits: Float[Array, "B N K"]) -> Float[Array, ""]:
    """Return mean of p(1 - p), p = sigmoid(logits): small when every bit is sure of itself."""
    p = jax.nn.sigmoid(logits)
    return jnp.mean(p * (1.0 - p))


def keep_tokens(
    code: Float[Array, "B N K"], counts: Float[Array, " B"] | Scalar
) -> Float[Array, "B N K"]:
    """Return codes of which only the first tokens are left; the others have no bit on.

    A token without a bit adds nothing to what the decoder reads, so that a code may be cut anywhere
    and filled up with zeros again.
    """
    kept = jnp.arange(code.shape[1]) < jnp.asarray(counts)[..., None]
    return code * kept[..., None].astype(code.dtype)


def drop_tail(
    code: Float[Array, "B N K"], key: Key[Array, ""], share: float
) -> Float[Array, "B N K"]:
    """Cut codes at random: this share of them after 1 to N tokens, uniformly.

    So trained, the first tokens say most, and fewer tokens decode too (nested dropout, Rippel et
    al., 2014; One-D-Piece, 2025).
    """
    batch, tokens = code.shape[:2]
    which, where = jax.random.split(key)
    counts = jax.random.randint(where, (batch,), 1, tokens + 1)
    cut = jax.random.bernoulli(which, share, (batch,))
    return keep_tokens(code, jnp.where(cut, counts, tokens).astype(code.dtype))
