"""The process: noise on bits, what a network is asked, and the steps back.

The mathematics: "Diffusion process" in docs/model.md.

Pure functions that know no network. Axes: B batch, N latent tokens, K bits. Bits are floats of 0
and 1; times are in [0, 1], 0 clean and 1 all noise.
"""

from typing import Literal

import jax
import jax.numpy as jnp
import optax

from instella_jax.errors import UserError

Target = Literal["epsilon", "x"]
TARGETS = ("epsilon", "x")
PROTOCOLS = (1, 2)
TIME_DISTRIBUTIONS = ("logit_normal", "uniform")

Scalar = jax.Array | float

# Stands for the division by temperature 0: its sigmoid is exactly 1.
SURE = 1e30


def mix(p: jax.Array, t: Scalar) -> jax.Array:
    """Return probability that a bit is 1 at time t, if it is 1 with probability p at time 0."""
    return p * (1.0 - t) + 0.5 * t


def add_noise(bits: jax.Array, t: jax.Array, uniforms: jax.Array) -> jax.Array:
    """Draw the noisy bits at time t.

    Args:
      bits: clean bits [B, N, K].
      t: [B].
      uniforms: [B, N, K] in [0, 1), the draw.

    Returns:
      z_t, [B, N, K].
    """
    return (uniforms < mix(bits, t[:, None, None])).astype(bits.dtype)


def check_target(target: str) -> None:
    """Refuse a target that is not one of `TARGETS`.

    Raises:
      UserError: it is not.
    """
    if target not in TARGETS:
        raise UserError(f"loss.target is {target!r}: expected one of {TARGETS}")


def times_at(quantiles: jax.Array, distribution: str = "logit_normal") -> jax.Array:
    """Return times [B] at quantiles [B] of their distribution, "logit_normal" or "uniform".

    Raises:
      UserError: the distribution is unknown.
    """
    if distribution not in TIME_DISTRIBUTIONS:
        raise UserError(f"loss.times is {distribution!r}: expected one of {TIME_DISTRIBUTIONS}")
    if distribution == "uniform":
        return quantiles
    return jax.nn.sigmoid(jax.scipy.special.ndtri(quantiles))


def sample_times(key: jax.Array, count: int, distribution: str = "logit_normal") -> jax.Array:
    """Draw times [count] of a distribution that `times_at` knows."""
    tiny = jnp.finfo(jnp.float32).tiny
    return times_at(jax.random.uniform(key, (count,), minval=tiny), distribution)


def spread_times(count: int, distribution: str = "logit_normal") -> jax.Array:
    """Return times [count] spread evenly over a distribution, for evaluation with less noise."""
    return times_at((jnp.arange(count) + 0.5) / count, distribution)


def clean_logits(output: jax.Array, z: jax.Array, target: Target = "epsilon") -> jax.Array:
    """Return logits of the clean bits [B, N, K] from a network's output and the bits z it saw.

    The "epsilon" target says whether a bit is flipped, the "x" target is the clean bit's logit.
    """
    return output if target == "x" else jnp.where(z > 0.5, -output, output)


def flip_logits(output: jax.Array, z: jax.Array, target: Target = "epsilon") -> jax.Array:
    """Return logits that a bit of z is flipped [B, N, K], from a network's output: see
    `clean_logits`."""
    return output if target == "epsilon" else jnp.where(z > 0.5, -output, output)


def loss(logits: jax.Array, bits: jax.Array) -> jax.Array:
    """Return mean binary cross-entropy of logits [B, N, K] with bits [B, N, K], in nats per bit."""
    return optax.sigmoid_binary_cross_entropy(logits.astype(jnp.float32), bits).mean()


def bit_accuracy(logits: jax.Array, bits: jax.Array) -> jax.Array:
    """Return share (0 to 1) of bits [B, N, K] that the sign of logits [B, N, K] tells right."""
    return jnp.mean((logits > 0) == (bits > 0.5))


def time(step: Scalar, steps: Scalar, rho: Scalar = 1.0) -> jax.Array:
    """Time at which a step starts: (1 - step / steps)^rho, from 1 at step 0 to 0 at the end."""
    return (1.0 - jnp.asarray(step, jnp.float32) / steps) ** rho


def guided(
    conditional: jax.Array, unconditional: jax.Array, guidance: Scalar, temperature: Scalar
) -> jax.Array:
    """Return guided logits ((1 + g) conditional - g unconditional) / temperature, float32.

    Args:
      conditional: logits given the prompt, any shape.
      unconditional: logits given the empty or negative prompt, the same shape.
      guidance: g; 0 is no guidance. Other systems often call 1 + g the scale.
      temperature: at 0 the result is so large that its sigmoid is exactly 0 or 1, and 0 where the
        guided logit is.
    """
    conditional, unconditional = (x.astype(jnp.float32) for x in (conditional, unconditional))
    logits = (1.0 + guidance) * conditional - guidance * unconditional
    cold = jnp.asarray(temperature) == 0
    return jnp.where(cold, jnp.sign(logits) * SURE, logits / jnp.where(cold, 1.0, temperature))


def draw_bits(
    conditional: jax.Array,
    unconditional: jax.Array,
    guidance: Scalar,
    temperature: Scalar,
    uniforms: jax.Array,
) -> jax.Array:
    """Draw bits from their own logits, as the autoregressive generator does.

    Args:
      conditional: logits given the prompt, any shape.
      unconditional: logits given the empty or negative prompt, the same shape.
      guidance: see `guided`.
      temperature: see `guided`; at 0 a bit is 1 where its guided logit is positive.
      uniforms: in [0, 1), the same shape, the draw.

    Returns:
      bits, float32 of 0 and 1.
    """
    logits = guided(conditional, unconditional, guidance, temperature)
    cold = jnp.asarray(temperature) == 0
    threshold = jnp.where(cold, 0.0, uniforms)
    return (threshold < jnp.where(cold, logits, jax.nn.sigmoid(logits))).astype(jnp.float32)


def step_probability(
    flip: jax.Array,
    z: jax.Array,
    t: Scalar,
    t_next: Scalar,
    protocol: int = 1,
) -> tuple[jax.Array, jax.Array]:
    """Return probabilities of bits being 1, clean and at the next time.

    Args:
      flip: guided flip logits [B, N, K].
      z: bits at time t [B, N, K].
      t: where the step starts.
      t_next: where it ends, below t.
      protocol: 1 draws a clean bit and adds the noise of `t_next`; 2 weighs that with how z came
        about (the posterior).

    Returns:
      clean: [B, N, K], probability that the clean bit is 1.
      following: [B, N, K], probability that the bit at `t_next` is 1.
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
    conditional: jax.Array,
    unconditional: jax.Array,
    z: jax.Array,
    t: Scalar,
    t_next: Scalar,
    guidance: Scalar,
    temperature: Scalar,
    is_last: jax.Array | bool,
    uniforms: jax.Array,
    protocol: int = 1,
) -> jax.Array:
    """Take one step back, from flip logits to the bits at the next time.

    Args:
      conditional: flip logits given the prompt [B, N, K].
      unconditional: flip logits given the empty or negative prompt [B, N, K].
      z: bits at time t [B, N, K].
      t: where the step starts.
      t_next: where it ends, below t.
      guidance: see `guided`.
      temperature: see `guided`; at 0 every draw becomes the threshold of the guided logits.
      is_last: the last step draws nothing: its bits are those more likely than not.
      uniforms: [B, N, K] in [0, 1), the draw.
      protocol: see `step_probability`.

    Returns:
      bits [B, N, K] in the type of z.
    """
    flip = guided(conditional, unconditional, guidance, temperature)
    clean, following = step_probability(flip, z.astype(jnp.float32), t, t_next, protocol)
    settled = jnp.logical_or(is_last, jnp.asarray(temperature) == 0)
    # Numbers are chosen, and not truth values, which TPU kernels cannot choose between.
    probability, threshold = jnp.where(settled, clean, following), jnp.where(settled, 0.5, uniforms)
    return (threshold < probability).astype(z.dtype)
