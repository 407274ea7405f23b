"""What is set once per process before any computation: devices, compile cache, log of them."""

import math
import os
from collections.abc import Sequence
from typing import Any

from instella_jax.config import Config
from instella_jax.errors import UserError
from instella_jax.runtime.compile_cache import use_cache

# Names of jax's backends that are also those of the extras that bring them.
EXTRAS = ("cuda", "rocm", "tpu")
ASK_DOCTOR = "; instella-jax doctor tells more"

# On a CPU each collective holds a thread of XLA's until all devices have come to it. Where
# parameters are divided, a device may begin many at once; with as many threads as devices, which is
# what XLA makes, all may then wait for a device that has none.
THREADS_PER_DEVICE = 64


def cpu_devices(batch_sizes: Sequence[int]) -> int:
    """Return how many CPU devices to make: the most that the cores allow and batches fill.

    Small models train faster on one device per core than on one device with many threads.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    fits = math.gcd(*batch_sizes)
    return max(n for n in range(1, (cores or 1) + 1) if fits % n == 0)


def find_devices() -> list[Any]:
    """Return `jax.devices()`; the first call in a process starts jax's backend.

    Raises:
      UserError: it does not start, as where JAX_PLATFORMS names one that is not installed.
    """
    import jax

    try:
        return jax.devices()
    except (RuntimeError, AssertionError) as error:
        raise UserError(_no_backend(error, os.environ.get("JAX_PLATFORMS", ""))) from error


def _no_backend(error: Exception, platforms: str) -> str:
    # What jax proposes in the end is said below, in other words.
    said = " ".join(str(error).split()).partition(" (set JAX_PLATFORMS")[0][:300]
    reason = f" ({said.rstrip('.')})" if said else ""
    if not platforms:
        return f"jax finds nothing to compute with{reason}{ASK_DOCTOR}"
    extras = [name for name in platforms.split(",") if name in EXTRAS]
    install = f"pip install 'instella-jax[{extras[0]}]', or " if extras else ""
    fault = f"JAX_PLATFORMS={platforms}, but jax starts no such backend here{reason}"
    return f"{fault}: {install}unset it{ASK_DOCTOR}"


def start(config: Config, processes: int = 1, training: bool = True) -> None:
    """Turn the persistent compilation cache on and say which devices are used.

    Args:
      config: its `mesh`, `run` and batch sizes decide how many devices a CPU becomes.
      processes: how many share the mesh; 0 where only jax knows.
      training: whether batches are large; else a CPU is one device, as the mesh allows: each more
        would hold the weights once more.

    Raises:
      UserError: jax does not start.
    """
    import jax

    use_cache()
    given = config.run.cpu_devices
    if not given and "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        sizes = list(config.mesh.values())
        train = config.train
        share = max(1, train.accumulate) * max(1, processes)
        if -1 not in sizes:
            given = math.prod(sizes) // max(1, processes)
        elif training:
            given = cpu_devices([train.batch_size // share, config.eval.batch_size])
        else:
            given = 1
    if given > 0:
        jax.config.update("jax_num_cpu_devices", given)
    if given > 1 and (config.mesh.fsdp, config.mesh.tensor) != (1, 1):
        # XLA's name for it. Training in parallel on data alone, where one collective waits for
        # another, is slower with more threads than cores.
        os.environ.setdefault("NPROC", str(THREADS_PER_DEVICE * given))
    devices = find_devices()
    if jax.process_index() == 0:
        kind = f"{len(devices)} {devices[0].platform} device(s): {devices[0].device_kind}"
        print(f"{kind}, {jax.process_count()} process(es)" if processes != 1 else kind, flush=True)
