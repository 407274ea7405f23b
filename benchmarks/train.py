"""Times the training step of a config on the devices that are here.

    python -m benchmarks.train --config=configs/t2i_diffusion.py
    python -m benchmarks.train --config=configs/t2i_diffusion.py --vary=unroll,remat,attention
    python -m benchmarks.train --config=configs/t2i_diffusion.py:instella_512 --synthetic \\
        --config.data.kind=codes --config.train.batch_size=64

Prints a Markdown table. --vary adds a row for each other value of these `run` keys. Every row is
measured in a process of its own, so that its memory is its own. --synthetic needs no files: random
weights in place of the frozen ones, one random batch in place of the data. Tokens are latent
tokens; memory is the peak of the fullest device, or on a CPU of the whole process.
"""

import functools
import json
import math
import os
import resource
import subprocess
import sys
import time
from typing import Any

from absl import app, flags
from ml_collections import config_flags

from instella_jax.commands.arguments import NO_CONFIG, parse_flags
from instella_jax.config import Config
from instella_jax.errors import UserError, command_line
from instella_jax.stages import parameters

OTHERS = {
    "unroll": (False, True),
    "remat": ("none", "dots", "full", "offload"),
    "attention": ("xla", "blocks", "cudnn", "flash"),
}

_CONFIG = config_flags.DEFINE_config_file("config", None, "As in instella_jax.main.")
_VARY = flags.DEFINE_list("vary", [], f"Keys of `run` to vary: {', '.join(OTHERS)}.")
_STEPS = flags.DEFINE_integer("steps", 50, "Steps to time, rounded up to whole calls.")
_SYNTHETIC = flags.DEFINE_bool("synthetic", False, "Random weights and data: needs no files.")
_ONE = flags.DEFINE_bool("one", False, "Measure in this process and print JSON.")


def synthetic(config: Config, stage: Any, mesh: Any) -> tuple[Any, Any]:
    """Return random frozen parameters, and a loader that gives one random batch for ever."""
    import itertools

    import jax
    import jax.numpy as jnp
    import numpy as np

    from instella_jax.planning import plan

    shapes = plan.frozen_shapes(stage, config, mesh)

    def make() -> Any:
        return jax.tree.map(
            lambda x: 0.02 * jax.random.normal(jax.random.key(x.size), x.shape, x.dtype), shapes
        )

    frozen = jax.jit(make, out_shardings=jax.tree.map(lambda x: x.sharding, shapes))()
    rows = config.train.batch_size // jax.process_count()
    batch = plan.batch_shapes(config, rows, (config.train.steps_per_call,))
    rng = np.random.default_rng(0)
    # Small enough for token ids, and every mask is True.
    values = {
        name: (rng.integers(1, 256, x.shape) if x.dtype != jnp.bool_ else np.ones(x.shape)).astype(
            x.dtype
        )
        for name, x in batch.items()
    }
    return frozen, itertools.repeat(values)


def peak_memory() -> int:
    """Return peak bytes of the fullest device, or of this process where devices do not tell."""
    import jax

    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    device = max(s.get("peak_bytes_in_use", 0) for s in stats)
    return device or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(config: Config, steps: int, made_up: bool) -> dict[str, Any]:
    """Time the step of a config as the training loop runs it."""
    import jax

    from benchmarks.timing import where
    from instella_jax.data.watch import DataWatch
    from instella_jax.runtime import devices, sharding
    from instella_jax.stages import make_stage
    from instella_jax.training import flops, setup
    from instella_jax.training.step import jit_step

    devices.start(config)
    # Compiling is measured, not reading what was compiled before.
    jax.config.update("jax_enable_compilation_cache", False)
    mesh = sharding.make_mesh(config.mesh)
    setup.check_sizes(config, mesh)
    stage, size = make_stage(config), config.train
    with sharding.use(mesh):
        if made_up:
            frozen, loader = synthetic(config, stage, mesh)
        else:
            frozen = parameters.load_frozen(stage, mesh)
            loader = stage.loader(
                "train", batch_size=size.batch_size, steps_per_call=size.steps_per_call
            )
        state, optimizer = setup.initial_state(stage, config, mesh)
        rows, watch = sharding.batch_sharding(mesh, leading=1), DataWatch()

        def take() -> Any:
            return sharding.place(sharding.arrays(watch.take(loader)), rows)

        batch = take()
        start = time.perf_counter()
        step = jit_step(stage, optimizer, config, state)
        compiled = step.lower(state, frozen, batch).compile()
        compile_seconds = time.perf_counter() - start
        state, metrics = compiled(state, frozen, batch)
        jax.block_until_ready(metrics)
        watch.waited()
        calls, seconds = number_of_calls(steps, size.steps_per_call), []
        begin = time.perf_counter()
        for _ in range(calls):
            state, following = compiled(state, frozen, take())
            # As in the loop: the device works on this call while the host reads the one before.
            jax.device_get(metrics)
            metrics, now = following, time.perf_counter()
            seconds.append((now - begin) / size.steps_per_call)
            begin = now
        jax.block_until_ready(metrics)
        seconds = seconds[1:]  # the first found the device idle
        waited = watch.waited()
    seconds.sort()
    median = seconds[len(seconds) // 2]
    operations = sum(flops.training(config).values())
    kind = mesh.devices.flat[0].device_kind
    speed = flops.speed(size.batch_size / median, operations, kind, mesh.size)
    return {
        "where": where(),
        "median": median,
        "least": seconds[0],
        "most": seconds[-1],
        "data_wait": waited,
        "compile_seconds": compile_seconds,
        "peak_memory": peak_memory(),
        "tokens_per_second": speed["images_per_second"] * config.model.num_tokens,
        **speed,
    }


def number_of_calls(steps: int, steps_per_call: int) -> int:
    """Return how many calls to make for `steps` to be timed: one that does not count, two at least.

    A call returns before it is computed, so that one alone would time nothing.
    """
    return 1 + max(2, math.ceil(steps / steps_per_call))


def variations(config: Config, keys: list[str]) -> list[tuple[str, str]]:
    """Return rows of the table: what is changed, "" for the config as it is, and the flag that does
    it.

    Raises:
      UserError: a key is none of `OTHERS`.
    """
    rows = [("", "")]
    for key in keys:
        if key not in OTHERS:
            raise UserError(f"--vary has {key!r}: expected some of {sorted(OTHERS)}")
        for value in OTHERS[key]:
            if value != config.run[key]:
                rows.append((f"run.{key}={value}", f"--config.run.{key}={value}"))
    return rows


COLUMNS = (
    "", "ms a step", "range", "waits for data", "compiling, s", "images/s", "tokens/s", "TFLOP/s",
    "of peak", "memory, GB",
)  # fmt: skip


def row(name: str, result: dict[str, Any]) -> str:
    """Return a result as a row of a Markdown table."""
    used = result.get("model_flops_utilisation")
    cells = (
        name,
        f"{1e3 * result['median']:.1f}",
        f"{1e3 * result['least']:.1f}-{1e3 * result['most']:.1f}",
        f"{result['data_wait']:.1%}",
        f"{result['compile_seconds']:.1f}",
        f"{result['images_per_second']:.1f}",
        f"{result['tokens_per_second']:.0f}",
        f"{result['model_tflops_per_device']:.3f}",
        "not known" if used is None else f"{used:.1%}",
        f"{result['peak_memory'] / 1e9:.2f}",
    )
    return f"| {' | '.join(cells)} |"


def run(argv: list[str]) -> None:
    """Measure the config, or start a process for each row.

    Raises:
      UserError: an argument cannot be used, or no row could be measured.
    """
    if _CONFIG.value is None:
        raise UserError(NO_CONFIG)
    if _STEPS.value < 1:
        raise UserError(f"--steps is {_STEPS.value}: expected at least 1")
    if _ONE.value:
        print(json.dumps(measure(_CONFIG.value, _STEPS.value, _SYNTHETIC.value)))
        return
    head = False
    for name, change in variations(_CONFIG.value, _VARY.value):
        command = [sys.executable, "-m", "benchmarks.train", *sys.argv[1:], "--one"]
        command += [change] if change else []
        # So that the last line of a failure is its reason.
        env = {**os.environ, "JAX_TRACEBACK_FILTERING": "off"}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
        name = name or "as configured"
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
            print(f"| {name} | not measured: {reason[:160]} |", flush=True)
            continue
        result = json.loads(done.stdout.splitlines()[-1])
        if not head:
            print(f"{result['where']}\n\n| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|")
            head = True
        print(row(name, result), flush=True)
    if not head:
        raise UserError("nothing was measured, for the reasons above")


def main() -> None:
    """Command-line entry; a user's mistake is one sentence."""
    with command_line():
        app.run(run, flags_parser=functools.partial(parse_flags, text=__doc__ or ""))


if __name__ == "__main__":
    main()
