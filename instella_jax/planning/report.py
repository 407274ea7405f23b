"""A plan in words; see `plan.py`."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

from instella_jax.config import Config
from instella_jax.data import buckets
from instella_jax.planning.plan import USABLE, Memory, Plan, imitate_devices, make_plan
from instella_jax.runtime import sharding
from instella_jax.training import flops

NOTES = """\
(e) is estimated, everything else counted. Temporaries are what the backward pass reads, times the
share of it that was measured on one GPU: compilers differ by a third. A speed is the utilisation
that you gave times the chip's dense bfloat16 peak: it says nothing of data, network or start-up."""


def number(value: float) -> str:
    """Write a positive number to three digits at least."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def several(count: int, noun: str) -> str:
    """Write how many there are of something."""
    return f"{count:,} {noun}" + ("s" if count != 1 else "")


def amount(size: float) -> str:
    """Write bytes in units of 10^9, or of 10^6 below a tenth of that."""
    return f"{size / 1e9:,.2f} GB" if size >= 1e8 else f"{size / 1e6:,.2f} MB"


def duration(seconds: float) -> str:
    """Write a time in days, or in hours or minutes where they are few."""
    for unit, size in (("days", 86_400), ("hours", 3_600)):
        if seconds >= 2 * size:
            return f"{number(seconds / size)} {unit}"
    return f"{number(seconds / 60)} minutes" if seconds >= 60 else "under a minute"


def memory_lines(memory: Memory) -> Iterator[str]:
    """Yield the table of what one device holds."""
    rows = {
        "parameters": memory.params,
        "their moving average": memory.average,
        "optimizer": memory.optimizer,
        "frozen parameters": memory.frozen,
        "batch": memory.batch,
        "gradients": memory.gradients,
        "activations and temporaries (e)": memory.working,
        "together (e)": memory.total,
    }
    for name, size in rows.items():
        yield f"  {name:<33}{amount(size):>14}"


def verdict_lines(plan: Plan) -> Iterator[str]:
    """Yield whether the step fits and, if not, what would."""
    limit = f"{amount(plan.limit)} ({USABLE:.0%} of a device)"
    if plan.fits:
        yield f"  fits in {limit}"
        return
    yield f"  WARNING: does NOT fit in {limit}"
    for changes, memory in plan.remedies:
        options = " ".join(f"--config.{key}={value}" for key, value in changes.items())
        fits = "fits" if memory.total <= plan.limit else "does not fit either"
        yield f"    with {options}: {amount(memory.total)}, {fits}"
    if not any(memory.total <= plan.limit for _, memory in plan.remedies):
        yield "    nothing tried fits: more devices (mesh.fsdp), or a smaller train.batch_size"


def chip_lines(plan: Plan, config: Config) -> Iterator[str]:
    """Yield speed and days on each chip."""
    wanted, train = config.plan, config.train
    per_image = sum(plan.flops.values())
    images = train.steps * train.batch_size
    yield (
        f"Speed of {several(wanted.devices, 'device')} at {wanted.utilisation:.0%} of peak (e), "
        f"and {several(train.steps, 'step')} of {several(train.batch_size, 'image')}:"
    )
    for chip in flops.CHIPS.values():
        one = wanted.utilisation * chip.tflops * 1e12 / per_image
        together = number(one * wanted.devices)
        time = duration(images / (one * wanted.devices))
        room = "" if plan.memory.total <= USABLE * chip.memory_gb * 1e9 else ", does not fit"
        mark = "*" if chip.name == wanted.chip else " "
        yield (
            f" {mark}{chip.name:<7}{chip.tflops:>6,.0f} TFLOP/s {chip.memory_gb:>4.0f} GB"
            f"{together:>14} images/s {f'({number(one)} a device)':<24}{time:>14}{room}"
        )


def as_values(plan: Plan, config: Config) -> dict[str, Any]:
    """Return the plan as JSON has it: bytes, parameters, seconds, FLOPs per image."""
    wanted, train = config.plan, config.train
    rate = wanted.utilisation * wanted.devices * 1e12 / sum(plan.flops.values())
    chips = {
        chip.name: {
            "images_per_second": rate * chip.tflops,
            "seconds": train.steps * train.batch_size / (rate * chip.tflops),
            "fits": plan.memory.total <= USABLE * chip.memory_gb * 1e9,
        }
        for chip in flops.CHIPS.values()
    }
    remedies = [
        {"changes": changes, "total": memory.total, "fits": memory.total <= plan.limit}
        for changes, memory in plan.remedies
    ]
    memory = {**dataclasses.asdict(plan.memory), "total": plan.memory.total}
    return {
        **dataclasses.asdict(plan),
        "stage": config.stage,
        "chip": wanted.chip,
        "devices": wanted.devices,
        "memory": memory,
        "fits": plan.fits,
        "remedies": remedies,
        "chips": chips,
    }


def report(plan: Plan, config: Config) -> str:
    """Return the plan as text."""
    train = config.train
    mesh = " ".join(f"{axis}={n}" for axis, n in plan.mesh.items() if (axis, n) != ("dcn_data", 1))
    parts = ", ".join(f"{name} {number(value / 1e9)}" for name, value in plan.flops.items())
    (height, width), *smaller = buckets.shapes(config)
    largest = f" (the largest of {1 + len(smaller)} buckets)" if smaller else ""
    rows = train.batch_size // math.prod(plan.mesh[axis] for axis in sharding.BATCH_AXES)
    return "\n".join(
        [
            f"Plan of stage {config.stage}: {height}x{width} px{largest}, mesh {mesh}, "
            f"batch {train.batch_size:,} ({rows:,} a device in "
            f"{several(train.accumulate, 'part')}), remat {config.run.remat}",
            f"Step compiled in {plan.compile_seconds:.0f} s.",
            f"Parameters: {number(plan.trained / 1e6)} M trained, "
            f"{number(plan.frozen / 1e6)} M frozen.",
            "Memory of one device:",
            *memory_lines(plan.memory),
            *verdict_lines(plan),
            f"Checkpoint: {amount(plan.checkpoint)}; train.keep={train.keep} of them: "
            f"{amount(plan.checkpoint * train.keep)}.",
            f"Training, GFLOP per image: {number(sum(plan.flops.values()) / 1e9)} "
            f"({parts}); XLA counts {number(plan.xla_flops / 1e9)}.",
            *chip_lines(plan, config),
            NOTES,
        ]
    )


def main(config: Config) -> Plan:
    """Print the plan of a config.

    Raises:
      UserError: see `plan.make_plan`.
    """
    imitate_devices(config.plan.devices)
    plan = make_plan(config)
    print(report(plan, config), flush=True)
    return plan
