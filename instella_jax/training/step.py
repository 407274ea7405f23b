"""What a training run carries from step to step, and one step of it.

Axes: G steps per call, A accumulation, B batch.
"""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from instella_jax.config import Config
from instella_jax.data.counters import Counter, make_counter
from instella_jax.models.functional import Params
from instella_jax.stages.base import Stage, without_critics
from instella_jax.training.optimizer import learning_rate

Metrics = dict[str, Any]

# Keeps the key of the rounding apart from those of the loss.
ROUNDING = 0x7FFFFFFF


class TrainState(flax.struct.PyTreeNode):
    """Everything that a checkpoint of the device side holds.

    Attributes:
      step: int32, optimizer steps tried so far, the skipped ones included.
      skipped: int32, steps skipped in a row up to now because something was not finite.
      params: trainable parameters, in the type `run.param_dtype`.
      ema: their exponential moving average, float32.
      opt_state: of the optimizer, its moments in float32.
      key: random key of the run; step s uses fold_in(key, s).
    """

    step: jax.Array
    skipped: jax.Array
    params: Params
    ema: Params
    opt_state: optax.OptState
    key: jax.Array


def init_state(
    params: Params, optimizer: optax.GradientTransformation, key: jax.Array
) -> TrainState:
    """Return the state before the first step, with the logical axes of `params` where they are
    boxed."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        skipped=jnp.zeros((), jnp.int32),
        params=params,
        ema=as_float32(params),
        opt_state=optimizer.init(as_float32(params)),
        key=key,
    )


def as_float32(tree: Any) -> Any:
    """Return a copy of a tree of arrays in float32."""
    return jax.tree.map(lambda x: jnp.array(x, jnp.float32), tree)


def apply_updates(params: Params, updates: Params, key: jax.Array) -> Params:
    """Add float32 updates to parameters.

    Bfloat16 parameters are rounded at random, up or down with probabilities that keep the mean:
    rounded to the nearest, a parameter of 0.1 would never take a step below 0.0002.
    """
    leaves, structure = jax.tree.flatten(params)
    moved = [
        round_at_random(p.astype(jnp.float32) + u, jax.random.fold_in(key, number))
        if p.dtype == jnp.bfloat16
        else (p + u).astype(p.dtype)
        for number, (p, u) in enumerate(zip(leaves, jax.tree.leaves(updates), strict=True))
    ]
    return jax.tree.unflatten(structure, moved)


def round_at_random(x: jax.Array, key: jax.Array) -> jax.Array:
    """Round finite float32 numbers to a bfloat16 beside them, whose mean is the number."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    # A bfloat16 is the upper half of a float32.
    carried = bits + (jax.random.bits(key, x.shape, jnp.uint32) >> 16)
    return jax.lax.bitcast_convert_type((carried >> 16).astype(jnp.uint16), jnp.bfloat16)


def gradients(
    stage: Stage, accumulate: int, params: Params, frozen: Params, batch: Any, key: jax.Array, step
) -> tuple[Params, Metrics]:
    """Return mean gradients and metrics over `accumulate` parts of a batch [B, ...], one at a
    time; gradients in float32."""

    def part(params: Params, batch: Any, key: jax.Array) -> tuple[jax.Array, Metrics]:
        loss, metrics = stage.loss(params, frozen, batch, key, step)
        return loss, {"loss": loss, **metrics}

    def grad(*args: Any) -> tuple[Params, Metrics]:
        grads, metrics = jax.grad(part, has_aux=True)(*args)
        return as_float32(grads), metrics

    if accumulate == 1:
        return grad(params, batch, key)
    # Strided parts keep each device's rows on that device.
    parts = jax.tree.map(
        lambda x: x.reshape(x.shape[0] // accumulate, accumulate, *x.shape[1:]).swapaxes(0, 1),
        batch,
    )

    def add(total: Any, item: Any) -> tuple[Any, None]:
        index, batch = item
        new = grad(params, batch, jax.random.fold_in(key, index))
        return jax.tree.map(jnp.add, total, new), None

    first = jax.tree.map(lambda x: x[0], parts)
    zero = jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(grad, params, first, key)
    )
    total, _ = jax.lax.scan(add, zero, (jnp.arange(accumulate), parts))
    return jax.tree.map(lambda x: x / accumulate, total)


def make_step(
    stage: Stage, optimizer: optax.GradientTransformation, config: Config, count: Counter
) -> Callable[[TrainState, Params, Any], tuple[TrainState, Metrics]]:
    """Return `step(state, frozen, batches) -> (state, metrics)` over batches [G, B, ...].

    A step whose loss or gradient norm is not finite, or whose norm exceeds `train.spike_norm`
    where that is positive, changes neither parameters, optimizer nor average. Critics have norms of
    their own, "grad_norm_PART".

    Metrics are means over the G steps, but for "skipped_in_a_row" after the last of them and
    "counts", sums over the G steps and all processes: "skipped" steps, and what `count` adds.
    """
    train = config.train
    limit = train.spike_norm if train.spike_norm > 0 else float("inf")

    def one(state: TrainState, frozen: Params, batch: Any) -> tuple[TrainState, Metrics, Any]:
        key = jax.random.fold_in(state.key, state.step)
        grads, metrics = gradients(
            stage, train.accumulate, state.params, frozen, batch, key, state.step
        )
        norm = optax.tree.norm(without_critics(stage, grads))
        critics = {
            f"grad_norm_{part}": optax.tree.norm(grads[part]) for part in sorted(stage.critics)
        }
        rate = learning_rate(config.optimizer, train.steps, state.opt_state)
        good = jnp.isfinite(metrics["loss"]) & jnp.isfinite(norm) & (norm <= limit)
        for critic in critics.values():
            good &= jnp.isfinite(critic)
        updates, opt_state = optimizer.update(grads, state.opt_state, as_float32(state.params))
        params = apply_updates(state.params, updates, jax.random.fold_in(key, ROUNDING))
        # A short warm-up of the average keeps the initial values out of it.
        decay = jnp.minimum(train.ema_decay, (1 + state.step) / (10 + state.step))
        # Written so that the average of what does not change is that, bit for bit.
        ema = jax.tree.map(lambda a, p: a + (1 - decay) * (p - a), state.ema, params)
        new = (params, ema, opt_state)
        old = (state.params, state.ema, state.opt_state)
        params, ema, opt_state = jax.tree.map(lambda n, o: jnp.where(good, n, o), new, old)
        state = state.replace(
            step=state.step + 1,
            skipped=jnp.where(good, 0, state.skipped + 1),
            params=params,
            ema=ema,
            opt_state=opt_state,
        )
        return state, {
            **metrics, **critics, "grad_norm": norm, "learning_rate": rate,
        }, ~good  # fmt: skip

    def step(state: TrainState, frozen: Params, batches: Any) -> tuple[TrainState, Metrics]:
        def scanned(state: TrainState, batch: Any) -> tuple[TrainState, Any]:
            state, *rest = one(state, frozen, batch)
            return state, rest

        state, (metrics, skipped) = jax.lax.scan(scanned, state, batches)
        # A sum over devices that waits for nothing could be begun beside those of the gradients. On
        # a CPU each holds a thread, and there are as many as devices: two begun by some devices may
        # leave none for the others, and all wait for ever. So these sums wait for the last step, of
        # which the parameters come last; what they say is always true.
        done = (state.skipped >= 0) | (jnp.asarray(optax.tree.sum(state.params)) > 0)
        counts = {"skipped": jnp.sum(skipped & done), **count(batches, done)}
        metrics = jax.tree.map(jnp.mean, metrics)
        return state, {**metrics, "skipped_in_a_row": state.skipped, "counts": counts}

    return step


def jit_step(
    stage: Stage, optimizer: optax.GradientTransformation, config: Config, state: TrainState
) -> jax.stages.Wrapped:
    """Return `make_step` under jit: it gives up the state, which comes back divided as it was.

    Args:
      state: arrays or shapes, with their shardings.
    """
    # Left to itself, XLA may divide a part of the new state otherwise than that of the old one, and
    # the next call would compile anew.
    where = jax.tree.map(lambda x: x.sharding, state)
    step = make_step(stage, optimizer, config, make_counter(config))
    return jax.jit(step, donate_argnums=0, out_shardings=(where, None))
