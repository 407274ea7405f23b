"""Where the time of a generator's training step goes: each part compiled and timed alone.

    python -m benchmarks.train_parts --config=configs/t2i_diffusion.py

Seconds are of the processor, summed over its cores, so that other programs take none of them: of
use on a CPU alone. Every call takes its memory anew, page by page, where the training loop spreads
that over the steps of a call: parts with gradients come out slower than they are there, and a trace
(--config.profile) is what to trust for shares of the real step.
"""

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from absl import app, flags
from ml_collections import config_flags

from benchmarks.timing import where
from instella_jax.commands.arguments import NO_CONFIG, parse_flags
from instella_jax.config import Config
from instella_jax.errors import UserError, command_line
from instella_jax.runtime import devices, sharding
from instella_jax.stages import make_stage, parameters
from instella_jax.training import setup
from instella_jax.training.step import gradients, make_step

_CONFIG = config_flags.DEFINE_config_file("config", None, "Of a generator.")
_REPEATS = flags.DEFINE_integer("repeats", 10, "Timed calls of each part.")


def seconds(call: Callable[[], Any], repeats: int) -> float:
    """Return median processor seconds of a call, the first of which compiles."""
    jax.block_until_ready(call())
    times = []
    for _ in range(repeats):
        start = time.process_time()
        jax.block_until_ready(call())
        times.append(time.process_time() - start)
    return statistics.median(times)


def measure(config: Config, repeats: int) -> tuple[float, dict[str, float]]:
    """Return seconds of a whole step, and of its parts.

    Raises:
      UserError: the stage is no generator.
    """
    if config.stage == "tokenizer":
        raise UserError("config.stage is 'tokenizer': only generators are timed by part")
    mesh = sharding.make_mesh(config.mesh)
    stage: Any = make_stage(config)
    with sharding.use(mesh):
        frozen, key = parameters.load_frozen(stage, mesh), jax.random.key(0)
        loader = stage.loader("train", batch_size=config.train.batch_size, prefetch=0)
        spent = {"data": seconds(lambda: next(loader), repeats)}
        loader.close()
        batch = sharding.place(sharding.arrays(next(stage.loader(
            "train", batch_size=config.train.batch_size
        ))), sharding.batch_sharding(mesh))  # fmt: skip
        state, optimizer = setup.initial_state(stage, config, mesh)
        params = state.params

        def timed(function: Callable[..., Any], *args: Any) -> float:
            compiled = jax.jit(function)
            return seconds(lambda: compiled(*args), repeats)

        if "image" in batch:
            spent["image encoder"] = timed(stage.encode, frozen, batch["image"])
        code = jax.jit(stage.code_of)(frozen, batch)
        ids, mask = batch["ids"], batch["mask"]
        features = jax.jit(stage.text_features)(params, frozen, ids, mask)

        def generator(params: Any, features: Any) -> Any:
            of_each = jnp.repeat(mask, stage.draws, axis=0)
            return stage.code_metrics(params, code, features, of_each, key, True)[0]

        def text(params: Any) -> Any:
            return stage.text_features(params, frozen, ids, mask)

        def text_backward(params: Any) -> Any:
            return jax.vjp(text, params)[1](features)

        spent["text encoder"] = timed(text_backward if config.text.trainable else text, params)
        forward = timed(generator, params, features)
        spent["generator, forward"] = forward
        both = timed(jax.grad(generator, (0, 1)), params, features)
        spent["generator, backward"] = both - forward
        grads, _ = jax.jit(
            lambda p: gradients(stage, 1, p, frozen, batch, key, 0)
        )(params)  # fmt: skip

        def update(grads: Any, state: Any) -> Any:
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
            new = optax.apply_updates(state.params, updates)
            return new, opt_state, optax.incremental_update(new, state.ema, 1e-3)

        spent["optimizer and average"] = timed(update, grads, state)
        step = make_step(stage, optimizer, config, lambda *_: {})
        one = jax.tree.map(lambda x: x[None], batch)
        whole = timed(step, state, frozen, one) + spent["data"]
    return whole, spent


def run(argv: list[str]) -> None:
    """Print the table."""
    if _CONFIG.value is None:
        raise UserError(NO_CONFIG)
    if _REPEATS.value < 1:
        raise UserError(f"--repeats is {_REPEATS.value}: expected at least 1")
    devices.start(_CONFIG.value)
    whole, spent = measure(_CONFIG.value, _REPEATS.value)
    print(f"{where()}; batch {_CONFIG.value.train.batch_size}; processor time")
    for name, part in {"data + step": whole, **spent, "sum": sum(spent.values())}.items():
        print(f"{name:24}{1e3 * part:9.1f} ms {part / whole:7.1%}")


def main() -> None:
    """Command-line entry; a user's mistake is one sentence."""
    with command_line():
        app.run(run, flags_parser=functools.partial(parse_flags, text=__doc__ or ""))


if __name__ == "__main__":
    main()
