"""Losses of a reconstruction, each with a weight, a start and a warm-up, as one.

Axes: B batch.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from instella_jax.config import Config

Step = Int[Array, ""] | int
Pictures = Float[Array, "B height width 3"]
# A balanced loss is never weighed more than this many times.
_MOST = 1e4


def ramp(config: Config, step: Step) -> Float[Array, ""]:
    """Return a loss's weight at a step: 0 before `start`, then rising linearly over `warmup` steps.

    Args:
      config: a section of `loss` with `weight`, `start` and `warmup`.
      step: of training.
    """
    done = jnp.asarray(step, jnp.float32) - config.start
    risen = jnp.clip(done / max(config.warmup, 1), 0.0, 1.0) if config.warmup else done >= 0
    return config.weight * jnp.asarray(risen, jnp.float32)


def from_start(config: Config, step: Step, function: Callable[..., Any], *inputs: Any) -> Any:
    """Return function(*inputs), and zeros in its place before `start`, when it is not computed."""
    if not config.start:
        return function(*inputs)
    shapes = jax.eval_shape(function, *inputs)

    def nothing(*inputs: Any) -> Any:
        del inputs
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

    return jax.lax.cond(jnp.asarray(step) >= config.start, function, nothing, *inputs)


@dataclasses.dataclass(frozen=True)
class Term:
    """One loss of a reconstruction.

    Attributes:
      config: its section, with `weight`, `start` and `warmup`.
      function: from reconstructions to the loss, a mean over them.
      balanced: whether its weight is measured by the gradient of all others together, so that at 1
        it pulls as strongly as they do.
    """

    config: Config
    function: Callable[[Pictures], Float[Array, ""]]
    balanced: bool = False


def weigh(
    decoded: Pictures, terms: Mapping[str, Term], step: Step
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Return the weighted sum of losses, and each loss by its name.

    Where there are several, metrics also have "pull_NAME", the norm of the weighted gradient that
    each has at the reconstructions. It costs nothing more: the gradient of each is taken there, and
    their sum goes through the decoder once.
    """
    if len(terms) == 1:
        ((name, term),) = terms.items()
        value = from_start(term.config, step, term.function, decoded)
        return ramp(term.config, step) * value, {name: value}
    here = jax.lax.stop_gradient(decoded)
    total, pull = jnp.zeros(()), jnp.zeros_like(decoded)
    metrics: dict[str, Float[Array, ""]] = {}
    # The balanced ones come last, when the pull of the others is known.
    for name, term in sorted(terms.items(), key=lambda item: item[1].balanced):
        value, gradient = from_start(term.config, step, jax.value_and_grad(term.function), here)
        weight = ramp(term.config, step)
        if term.balanced:
            ratio = _norm(pull) / jnp.maximum(_norm(gradient), 1e-12)
            weight *= jnp.minimum(ratio, _MOST)
        total, pull = total + weight * value, pull + weight * gradient
        metrics |= {name: value, f"pull_{name}": weight * _norm(gradient)}
    # Its value is 0, its gradient the sum of theirs.
    carrier = jnp.sum(jax.lax.stop_gradient(pull) * (decoded - here))
    return jax.lax.stop_gradient(total) + carrier, metrics


def weigh_at(
    inputs: tuple[Any, ...], config: Config, function: Callable[..., Float[Array, ""]], step: Step
) -> tuple[Float[Array, ""], Float[Array, ""], Float[Array, ""]]:
    """Return function(*inputs) weighted, as it is, and the norm of the weighted gradient that it
    has at the first of the inputs.

    Args:
      inputs: trees of arrays, through which the gradient goes on.
      config: the section of the loss.
      function: the loss.
      step: of training.
    """
    here = jax.lax.stop_gradient(inputs)
    gradients = jax.value_and_grad(function, argnums=tuple(range(len(inputs))))
    value, pull = from_start(config, step, gradients, *here)
    weight = ramp(config, step)
    # See `weigh`.
    moved = jax.tree.map(lambda g, x, y: jnp.sum(g * (x - y)), pull, inputs, here)
    total = jax.lax.stop_gradient(weight * value) + weight * optax.tree.sum(moved)
    return total, value, weight * optax.tree.norm(pull[0])


def _norm(x: Pictures) -> Float[Array, ""]:
    return jnp.sqrt(jnp.sum(jnp.square(x)))
