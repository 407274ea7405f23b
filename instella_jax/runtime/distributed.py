"""Joining the processes of a run, and letting them agree.

One process drives one host (or one GPU of it). Who the others are comes from flags, from Slurm or
from the TPU's environment; jax does the rest.
"""

import collections
import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from instella_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Setup:
    """How this process joins the others.

    Attributes:
      how: "alone", "flags", "slurm" or "tpu".
      processes: how many there are; 0 where jax finds out.
      options: arguments of `jax.distributed.initialize`.
    """

    how: str
    processes: int = 1
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def detect(
    environ: Mapping[str, str],
    method: str = "auto",
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
) -> Setup:
    """Find out how to join, touching nothing.

    Args:
      environ: environment variables. JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and
        JAX_PROCESS_ID stand in for the arguments that are not given.
      method: "auto" looks at arguments, then Slurm, then TPU; "off" is alone whatever there is.
      coordinator: host:port of process 0.
      processes: how many.
      process: number of this one.

    Raises:
      UserError: the arguments do not say enough, or contradict each other.
    """
    if method == "off":
        return Setup("alone")
    coordinator = coordinator or environ.get("JAX_COORDINATOR_ADDRESS")
    processes = _number(processes, environ, "JAX_NUM_PROCESSES")
    process = _number(process, environ, "JAX_PROCESS_ID")
    given = (coordinator, processes, process)
    if method == "auto" and processes is not None and process is not None and coordinator:
        if ":" not in coordinator or not 0 <= process < processes:
            raise UserError(
                f"process {process} of {processes} at {coordinator!r} cannot be: expected "
                "0 <= process_id < num_processes, and an address host:port"
            )
        options = dict(
            coordinator_address=coordinator,
            num_processes=processes,
            process_id=process,
            # Else jax asks the cluster for what is left, the devices to use.
            cluster_detection_method="deactivate",
        )
        return Setup("flags", processes, options)
    if method == "auto" and (processes is not None or process is not None):
        raise UserError(
            f"coordinator_address, num_processes and process_id belong together, got {given}"
        )
    slurm = _slurm(environ)
    if method == "slurm" and slurm is None:
        raise UserError(
            "this process was not started by srun with several tasks: SLURM_NTASKS, SLURM_PROCID "
            "or SLURM_STEP_NODELIST is missing"
        )
    if method in ("auto", "slurm") and slurm is not None:
        return slurm
    pod = "," in environ.get("TPU_WORKER_HOSTNAMES", "")
    if method == "tpu" or pod or environ.get("MEGASCALE_COORDINATOR_ADDRESS"):
        return Setup("tpu", 0)
    return Setup("alone")


def _number(value: int | None, environ: Mapping[str, str], name: str) -> int | None:
    if value is not None or not environ.get(name):
        return value
    try:
        return int(environ[name])
    except ValueError:
        raise UserError(f"{name} is {environ[name]!r}: expected a whole number") from None


def _slurm(environ: Mapping[str, str]) -> Setup | None:
    """Read Slurm's variables; None outside of a step of several tasks."""
    needed = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID")
    if not all(environ.get(name) for name in needed):
        return None
    tasks = _number(None, environ, "SLURM_NTASKS")
    if tasks is None or tasks < 2:
        return None
    options: dict[str, Any] = dict(cluster_detection_method="slurm")
    nodes = _number(None, environ, "SLURM_STEP_NUM_NODES") or 1
    gpus = environ.get("SLURM_GPUS_ON_NODE", "")
    if tasks == nodes and gpus.isdigit():
        # jax gives each task one GPU, which is wrong where a task has the whole node.
        options["local_device_ids"] = list(range(int(gpus)))
    return Setup("slurm", tasks, options)


def join(setup: Setup) -> None:
    """Join the other processes; before anything else is asked of jax.

    Raises:
      UserError: they cannot be reached.
    """
    if setup.how == "alone":
        return
    try:
        jax.distributed.initialize(**setup.options)
    except (RuntimeError, ValueError) as error:
        line = " ".join(str(error).split())[:300]
        raise UserError(
            f"cannot join the other processes ({setup.how}): {line}; check that all of them were "
            "started and that the coordinator's port can be reached"
        ) from error


class Agreement:
    """Makes one decision of the wishes of all processes, at the same step in each.

    The votes travel with the steps and are read some steps later, so that no device waits.
    """

    def __init__(self, mesh: jax.sharding.Mesh, delay: int = 2):
        """Prepare for the devices of a mesh; with several processes, all must take part.

        Args:
          mesh: the devices.
          delay: how many calls later a wish is granted; with one process it is at once.
        """
        self._delay = delay
        self._count = len(mesh.local_devices)
        self._spread = NamedSharding(mesh, P(mesh.axis_names))
        self._any = jax.jit(jnp.any, out_shardings=NamedSharding(mesh, P()))
        self._cast: collections.deque[jax.Array] = collections.deque()

    def __call__(self, wish: bool) -> bool:
        """Return whether any process had the wish, `delay` calls ago."""
        if jax.process_count() == 1:
            return wish
        votes = jax.make_array_from_process_local_data(
            self._spread, np.full(self._count, wish, bool)
        )
        self._cast.append(self._any(votes))
        return bool(self._cast.popleft()) if len(self._cast) > self._delay else False
