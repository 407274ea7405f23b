"""A plan in words; see `plan.py`."""

from collections.abc import Iterator

from instella_jax import flops
from instella_jax.config import Config
from instella_jax.data import buckets
from instella_jax.plan import USABLE, Memory, Plan, make_plan, start

NOTES = """\
(e) is estimated, everything else counted. Working memory is XLA's for CPU devices: an accelerator's
compiler fuses differently and its attention kernels may need less. A speed is the utilisation that
you gave times the chip's dense bfloat16 peak: it says nothing of data, network or start-up."""


def giga(size: float) -> str:
    """Writes bytes in units of 10^9."""
    return f"{size / 1e9:,.2f} GB"


def memory_lines(memory: Memory) -> Iterator[str]:
    """Yields the table of what one device holds."""
    rows = {
        "parameters": memory.params,
        "their moving average": memory.average,
        "optimizer": memory.optimizer,
        "frozen parameters": memory.frozen,
        "batch": memory.batch,
        "activations, gradients, temporaries (e)": memory.working,
        "together (e)": memory.total,
    }
    for name, size in rows.items():
        yield f"  {name:<41}{giga(size):>14}"


def verdict_lines(plan: Plan) -> Iterator[str]:
    """Yields whether the step fits and, if not, what would."""
    limit = f"{giga(plan.limit)} ({USABLE:.0%} of a device)"
    if plan.fits:
        yield f"  fits in {limit}"
        return
    yield f"  WARNING: does NOT fit in {limit}"
    for changes, memory in plan.remedies:
        options = " ".join(f"--config.{key}={value}" for key, value in changes.items())
        fits = "fits" if memory.total <= plan.limit else "does not fit either"
        yield f"    with {options}: {giga(memory.total)}, {fits}"
    if not any(memory.total <= plan.limit for _, memory in plan.remedies):
        yield "    nothing tried fits: more devices (mesh.fsdp), or a smaller train.batch_size"


def chip_lines(plan: Plan, config: Config) -> Iterator[str]:
    """Yields speed and days on each chip."""
    wanted, train = config.plan, config.train
    per_image = sum(plan.flops.values())
    images = train.steps * train.batch_size
    yield (
        f"Speed of {wanted.devices} devices at {wanted.utilisation:.0%} of peak (e), and "
        f"{train.steps:,} steps of {train.batch_size:,} images:"
    )
    for chip in flops.CHIPS.values():
        one = wanted.utilisation * chip.tflops * 1e12 / per_image
        days = images / (one * wanted.devices) / 86_400
        room = "" if plan.memory.total <= USABLE * chip.memory_gb * 1e9 else ", does not fit"
        mark = "*" if chip.name == wanted.chip else " "
        yield (
            f" {mark}{chip.name:<7}{chip.tflops:>6,.0f} TFLOP/s {chip.memory_gb:>4.0f} GB"
            f"{one * wanted.devices:>10,.0f} images/s ({one:,.1f} a device)"
            f"{days:>9,.2f} days{room}"
        )


def report(plan: Plan, config: Config) -> str:
    """Returns the plan as text."""
    train = config.train
    mesh = " ".join(f"{axis}={n}" for axis, n in plan.mesh.items())
    parts = ", ".join(f"{name} {value / 1e9:,.0f}" for name, value in plan.flops.items())
    (height, width), *smaller = buckets.shapes(config)
    largest = f" (the largest of {1 + len(smaller)} buckets)" if smaller else ""
    rows = train.batch_size // (plan.mesh["data"] * plan.mesh["fsdp"])
    return "\n".join(
        [
            f"Plan of stage {config.stage}: {height}x{width} px{largest}, mesh {mesh}, "
            f"batch {train.batch_size:,} ({rows:,} a device in {train.accumulate} part(s)), "
            f"remat {config.run.remat}",
            f"Step compiled in {plan.compile_seconds:.0f} s.",
            f"Parameters: {plan.trained / 1e6:,.1f} M trained, {plan.frozen / 1e6:,.1f} M frozen.",
            "Memory of one device:",
            *memory_lines(plan.memory),
            *verdict_lines(plan),
            f"Checkpoint: {giga(plan.checkpoint)}; train.keep={train.keep} of them: "
            f"{giga(plan.checkpoint * train.keep)}.",
            f"Training, GFLOP per image: {sum(plan.flops.values()) / 1e9:,.0f} ({parts}); "
            f"XLA counts {plan.xla_flops / 1e9:,.0f}.",
            *chip_lines(plan, config),
            NOTES,
        ]
    )


def main(config: Config) -> Plan:
    """Prints the plan of a config.

    Raises:
      UserError: see `plan.make_plan`.
    """
    start(config.plan.devices)
    plan = make_plan(config)
    print(report(plan, config), flush=True)
    return plan
