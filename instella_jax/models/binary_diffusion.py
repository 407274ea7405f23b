"""The process: noise on bits, what a network is asked, and the steps back.

The mathematics: "Diffusion process" in docs/model.md.

Pure functions that know no network. Axes: B batch, N latent tokens, K bits. Bits are floats of 0
and 1; times are in [0, 1], 0 clean and 1 all noise.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Key, Shaped

from instella_jax.errors import UserError

Target = Literal["epsilon", "x"]
PROTOCOLS = (1, 2)
TIME_DISTRIBUTIONS = ("logit_normal", "uniform")

Scalar = Shaped[Array, ""] | float | int

# Stands for the division by temperature 0: its sigmoid is exactly 1.
SURE = 1e30


def mix(p: Float[Array, "*axes"], t: Float[Array, "*#axes"] | Scalar) -> Float[Array, "*axes"]:
    """Return the probability that a bit is 1 at time t, if it is 1 with probability p at time 0."""
    return p * (1.0 - t) + 0.5 * t


def add_noise(
    bits: Float[Array, "B N K"], t: Float[Array, " B"], uniforms: Float[Array, "B N K"]
) -> Float[Array, "B N K"]:
    """Return the noisy bits z_t of clean ones, from uniform numbers in [0, 1)."""
    return (uniforms < mix(bits, t[:, None, None])).astype(bits.dtype)


def times_at(
    quantiles: Float[Array, " B"], distribution: str = "logit_normal", shift: Scalar = 1.0
) -> Float[Array, " B"]:
    """Return the times at quantiles of their distribution, "logit_normal" or "uniform".

    A shift s over 1 moves them towards noise, to s t / (1 + (s - 1) t), which adds log s to the
    logit (Esser et al., 2024).

    Raises:
      UserError: the distribution is unknown.
    """
    if distribution not in TIME_DISTRIBUTIONS:
        raise UserError(f"loss.times is {distribution!r}: expected one of {TIME_DISTRIBUTIONS}")
    if distribution == "uniform":
        times = quantiles
    else:
        times = jax.nn.sigmoid(jax.scipy.special.ndtri(quantiles))
    return shift * times / (1.0 + (shift - 1.0) * times)


def sample_times(
    key: Key[Array, ""], count: int, distribution: str = "logit_normal", shift: Scalar = 1.0
) -> Float[Array, " {count}"]:
    """Sample times of a distribution that `times_at` knows."""
    tiny = jnp.finfo(jnp.float32).tiny
    return times_at(jax.random.uniform(key, (count,), minval=tiny), distribution, shift)


def spread_times(
    count: int, distribution: str = "logit_normal", shift: Scalar = 1.0
) -> Float[Array, " {count}"]:
    """Return times spread evenly over a distribution, for evaluation with less noise."""
    return times_at((jnp.arange(count) + 0.5) / count, distribution, shift)


def clean_logits(
    output: Float[Array, "B N K"], z: Float[Array, "B N K"], target: Target = "epsilon"
) -> Float[Array, "B N K"]:
    """Return the logits of the clean bits from a network's output and the bits z it saw.

    The "epsilon" target says whether a bit is flipped, the "x" target is the clean bit's logit.
    """
    return output if target == "x" else jnp.where(z > 0.5, -output, output)


def flip_logits(
    output: Float[Array, "B N K"], z: Float[Array, "B N K"], target: Target = "epsilon"
) -> Float[Array, "B N K"]:
    """Return the logits that bits of `z` are flipped, from a network's output.

    See `clean_logits`.
    """
    return output if target == "epsilon" else jnp.where(z > 0.5, -output, output)


def loss(logits: Float[Array, "B N K"], bits: Float[Array, "B N K"]) -> Float[Array, ""]:
    """Return the mean binary cross-entropy of logits with bits, in nats per bit."""
    import optax  # which sampling does without

    return optax.sigmoid_binary_cross_entropy(logits.astype(jnp.float32), bits).mean()


def bit_accuracy(logits: Float[Array, "B N K"], bits: Float[Array, "B N K"]) -> Float[Array, ""]:
    """Return the share (0 to 1) of bits that the sign of their logits gives right."""
    return jnp.mean((logits > 0) == (bits > 0.5))


def time_of_step(step: Scalar, steps: Scalar, rho: Scalar = 1.0) -> Float[Array, ""]:
    """Return when a step starts: (1 - step / steps)^rho, from 1 at step 0 to 0 at the end."""
    return (1.0 - jnp.asarray(step, jnp.float32) / steps) ** rho


def guided(
    conditional: Float[Array, "*axes"],
    unconditional: Float[Array, "*axes"],
    guidance: Scalar,
    temperature: Scalar,
) -> Float32[Array, "*axes"]:
    """Return the guided logits ((1 + g) conditional - g unconditional) / temperature.

    Args:
      conditional: logits given the prompt.
      unconditional: logits given the empty or negative prompt.
      guidance: g; 0 is no guidance. Other systems often call 1 + g the scale.
      temperature: at 0 the result is so large that its sigmoid is exactly 0 or 1, and 0 where the
        guided logit is.
    """
    conditional, unconditional = (x.astype(jnp.float32) for x in (conditional, unconditional))
    logits = (1.0 + guidance) * conditional - guidance * unconditional
    cold = jnp.asarray(temperature) == 0
    return jnp.where(cold, jnp.sign(logits) * SURE, logits / jnp.where(cold, 1.0, temperature))


def sample_bits(
    conditional: Float[Array, "*axes"],
    unconditional: Float[Array, "*axes"],
    guidance: Scalar,
    temperature: Scalar,
    uniforms: Float[Array, "*axes"],
) -> Float32[Array, "*axes"]:
    """Sample bits from their own logits, as the autoregressive generator does.

    Args:
      conditional: logits given the prompt.
      unconditional: logits given the empty or negative prompt.
      guidance: see `guided`.
      temperature: see `guided`; at 0 a bit is 1 where its guided logit is positive.
      uniforms: uniform numbers in [0, 1).

    Returns:
      bits of 0 and 1.
    """
    logits = guided(conditional, unconditional, guidance, temperature)
    cold = jnp.asarray(temperature) == 0
    threshold = jnp.where(cold, 0.0, uniforms)
    return (threshold < jnp.where(cold, logits, jax.nn.sigmoid(logits))).astype(jnp.float32)


def step_probability(
    flip: Float[Array, "*axes"],
    z: Float[Array, "*axes"],
    t: Scalar,
    t_next: Scalar,
    protocol: int = 1,
) -> tuple[Float[Array, "*axes"], Float[Array, "*axes"]]:
    """Return the probabilities of bits being 1, clean and at the next time.

    Args:
      flip: guided flip logits.
      z: bits at time t.
      t: where the step starts.
      t_next: where it ends, below t.
      protocol: 1 samples a clean bit and adds the noise of `t_next`; 2 weighs that with how z came
        about (the posterior).

    Returns:
      clean: probability that the clean bit is 1.
      following: probability that the bit at `t_next` is 1.
    """
    flipped = jax.nn.sigmoid(flip)
    clean = z * (1.0 - flipped) + (1.0 - z) * flipped
    if protocol == 1:
        return clean, mix(clean, t_next)
    if protocol != 2:
        raise ValueError(f"protocol {protocol!r} is not one of {PROTOCOLS}")
    one = mix(clean, t_next) * (z - (t - t_next) * (z - 0.5))
    zero = mix(1.0 - clean, t_next) * ((1.0 - z) - (t - t_next) * (0.5 - z))
    return clean, one / (one + zero)


def sampling_step(
    conditional: Float[Array, "*axes"],
    unconditional: Float[Array, "*axes"],
    z: Float[Array, "*axes"],
    t: Scalar,
    t_next: Scalar,
    guidance: Scalar,
    temperature: Scalar,
    is_last: Bool[Array, ""] | bool,
    uniforms: Float[Array, "*axes"],
    protocol: int = 1,
) -> Float[Array, "*axes"]:
    """Take one step back, from flip logits to the bits at the next time.

    Args:
      conditional: flip logits given the prompt.
      unconditional: flip logits given the empty or negative prompt.
      z: bits at time t.
      t: where the step starts.
      t_next: where it ends, below t.
      guidance: see `guided`.
      temperature: see `guided`; at 0 every sample becomes the threshold of the guided logits.
      is_last: whether this is the last step, which samples nothing: its bits are those more
        likely than not.
      uniforms: uniform numbers in [0, 1).
      protocol: see `step_probability`.

    Returns:
      bits in the type of z.
    """
    flip = guided(conditional, unconditional, guidance, temperature)
    clean, following = step_probability(flip, z.astype(jnp.float32), t, t_next, protocol)
    settled = jnp.logical_or(is_last, jnp.asarray(temperature) == 0)
    # Numbers are chosen, and not truth values, which TPU kernels cannot choose between.
    probability, threshold = jnp.where(settled, clean, following), jnp.where(settled, 0.5, uniforms)
    return (threshold < probability).astype(z.dtype)
