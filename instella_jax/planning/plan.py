"""`--mode=plan`: what a config needs and costs, told from shapes on any machine.

The training step of the config is compiled by XLA for as many imaginary CPU devices as the plan
has; nothing is allocated, and no weights or pictures are needed.

Axes: G steps per call, B batch, L text length.
"""

import dataclasses
import math
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from instella_jax.config import Config
from instella_jax.config_keys import check_values
from instella_jax.data import buckets, codes
from instella_jax.errors import UserError
from instella_jax.models.functional import abstract_params
from instella_jax.runtime import sharding
from instella_jax.stages import make_stage
from instella_jax.stages.base import Stage
from instella_jax.stages.precomputed_codes import trains_on_codes
from instella_jax.training import flops
from instella_jax.training.optimizer import make_optimizer
from instella_jax.training.setup import check_sizes, state_shapes
from instella_jax.training.step import jit_step

# What XLA for an H200 needed beside state and gradients, as a share of what `backward_bytes` says:
# 0.72, 0.60 and 0.75 for a generator of the published size under remat full, dots and none (jax
# 0.11.2, November 2026). XLA for a CPU, which fuses less and has no bfloat16 products, asks for up
# to three times that.
MEASURED_SHARE = 0.75
# The rest of a device's memory is for the runtime, libraries and fragmentation.
USABLE = 0.9
# Numbers of parts of a batch that are compiled before giving up.
ATTEMPTS = 2


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes that a training step needs of one device.

    Attributes:
      params: trained parameters.
      average: their moving average.
      optimizer: moments of the optimizer.
      frozen: parameters that are only read.
      batch: pictures and captions.
      gradients: of the trained parameters; of a part of the batch too where parts are summed up.
      working: activations and temporaries, the rest of what XLA assigns buffers to.
    """

    params: int
    average: int
    optimizer: int
    frozen: int
    batch: int
    gradients: int
    working: int

    @property
    def kept(self) -> int:
        """What stays from step to step."""
        return self.params + self.average + self.optimizer + self.frozen

    @property
    def total(self) -> int:
        """All of it."""
        return self.kept + self.batch + self.gradients + self.working


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a config needs.

    Attributes:
      memory: of one device.
      limit: bytes of a device that may be used.
      compile_seconds: what compiling the step took here.
      mesh: size of each axis.
      trained: number of trained parameters.
      frozen: number of frozen parameters.
      checkpoint: bytes of one checkpoint.
      flops: per image, by part, by formula.
      xla_flops: per image, XLA's count.
      remedies: what was tried where the step does not fit: changed keys, and the memory then.
    """

    memory: Memory
    limit: float
    compile_seconds: float
    mesh: dict[str, int]
    trained: int
    frozen: int
    checkpoint: int
    flops: dict[str, int]
    xla_flops: float
    remedies: tuple[tuple[dict[str, Any], Memory], ...]

    @property
    def fits(self) -> bool:
        """Whether the step fits as it is configured."""
        return self.memory.total <= self.limit


def imitate_devices(devices: int) -> None:
    """Make imaginary CPU devices, whatever accelerators there are."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", devices)


def frozen_shapes(stage: Stage, config: Config, mesh: jax.sharding.Mesh) -> Any:
    """Return shapes of the frozen parameters, in the type that they are held in."""
    boxed = {part: abstract_params(network) for part, network in stage.frozen_networks.items()}
    dtype = jnp.dtype(config.run.param_dtype)
    return jax.tree.map(lambda x: x.update(dtype=dtype), sharding.placed(boxed, mesh))


def batch_shapes(config: Config, rows: int, leading: tuple[int, ...] = ()) -> dict[str, Any]:
    """Return shapes of what a training batch of the config sends to the devices, [*leading, rows,
    ...].

    Of several shapes that pictures may have it is the largest.
    """
    shapes: dict[str, Any] = {"image": ((*buckets.shapes(config)[0], 3), jnp.uint8)}
    if trains_on_codes(config):
        packed = codes.packed_bytes(config.model.num_tokens, config.model.bits)
        shapes = {"code": ((packed,), jnp.uint8)}
    if config.stage != "tokenizer":
        length = config.text.max_length
        shapes |= {"ids": ((length,), jnp.int32), "mask": ((length,), jnp.bool_)}
    return {
        name: jax.ShapeDtypeStruct((*leading, rows, *shape), dtype)
        for name, (shape, dtype) in shapes.items()
    }


def size(tree: Any) -> int:
    """Return the size of a tree of shapes in bytes."""
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def local_size(tree: Any) -> int:
    """Return bytes that one device holds of a tree of shapes with shardings."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
    )


def parameter_count(tree: Any) -> int:
    """Return the number of parameters."""
    return sum(math.prod(x.shape) for x in jax.tree.leaves(tree))


def abstract_step(
    config: Config, mesh: jax.sharding.Mesh
) -> tuple[jax.stages.Wrapped, tuple[Any, Any, Any]]:
    """Return a config's jitted step, and the shapes of its arguments with their shardings.

    The arguments are the train state, the frozen parameters and a batch.

    Raises:
      UserError: sizes in the config do not fit each other.
    """
    check_sizes(config, mesh)
    stage = make_stage(config)
    optimizer = make_optimizer(config.optimizer, config.train.steps, stage.critics)
    state = state_shapes(stage, config, mesh)
    rows = sharding.batch_sharding(mesh, leading=1)
    batch = jax.tree.map(
        lambda x: x.update(sharding=rows),
        batch_shapes(config, config.train.batch_size, (config.train.steps_per_call,)),
    )
    step = jit_step(stage, optimizer, config, state)
    return step, (state, frozen_shapes(stage, config, mesh), batch)


def backward_bytes(config: Config, rows: int) -> float:
    """Return bytes that the backward pass of `rows` pictures reads and one block computes again.

    Counted from shapes as jax differentiates, parameters left out.
    """

    def kept(rows: int, remat: str) -> int:
        stage = make_stage(changed(config, {"run.remat": remat}))
        params, frozen = _plain_shapes(stage)

        def backward(params: Any, frozen: Any, batch: Any, key: jax.Array) -> Any:
            def loss(params: Any) -> jax.Array:
                return stage.loss(params, frozen, batch, key, jnp.zeros((), jnp.int32))[0]

            return jax.vjp(loss, params)[1]

        batch = batch_shapes(config, rows)
        found = jax.tree.leaves(jax.eval_shape(backward, params, frozen, batch, jax.random.key(0)))
        return size([x for x in found if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key)])

    def of_one_row(remat: str) -> int:
        # Two rows and one differ by a row: parameters and tables are in both.
        return kept(2, remat) - kept(1, remat)

    remat = config.run.remat
    one = of_one_row(remat)
    if remat != "none":
        sizes = config.model
        one += of_one_row("none") / (sizes.get("num_layers") or sizes.encoder_layers)
    return rows * one


def _plain_shapes(stage: Stage) -> Any:
    """Return shapes of the parameters of a stage, trained and frozen, on one device."""
    return tuple(
        {part: sharding.values(abstract_params(network)) for part, network in networks.items()}
        for networks in (stage.networks, stage.frozen_networks)
    )


def measure(config: Config, mesh: jax.sharding.Mesh) -> tuple[Memory, Any, Any]:
    """Compile a config's step.

    Returns:
      What it needs of one device, and the shapes of the train state and of the frozen parameters.

    Raises:
      UserError: sizes in the config do not fit each other.
    """
    step, (state, frozen, batch) = abstract_step(config, mesh)
    with sharding.use(mesh):
        analysis = step.lower(state, frozen, batch).compile().memory_analysis()
    if analysis is None:
        raise UserError("this version of jax tells nothing of the memory of compiled programs")
    average, parts = local_size(state.ema), config.train.accumulate
    # See `step.gradients`: they are as large as the average, and divided like it.
    gradients = min(average * (1 if parts == 1 else 2), analysis.temp_size_in_bytes)
    memory = Memory(
        local_size(state.params),
        average,
        local_size(state.opt_state),
        local_size(frozen),
        local_size(batch),
        gradients,
        working_bytes(config, mesh, analysis.temp_size_in_bytes - gradients),
    )
    return memory, state, frozen


def working_bytes(config: Config, mesh: jax.sharding.Mesh, of_cpu: int) -> int:
    """Estimate activations and temporaries of one device.

    Args:
      config: of the step.
      mesh: of the plan.
      of_cpu: what XLA for a CPU asks for, which is the most that is said.
    """
    rows = config.train.batch_size // sharding.batch_parts(mesh) // config.train.accumulate
    wanted = MEASURED_SHARE * backward_bytes(config, rows) / mesh.shape["tensor"]
    return min(of_cpu, round(wanted))


def changed(config: Config, changes: Mapping[str, Any]) -> Config:
    """Return a copy of a config with some keys changed."""
    copy = config.copy_and_resolve_references()
    copy.update_from_flattened_dict(changes)
    return copy


def xla_flops(config: Config) -> float:
    """Return XLA's count of what training takes per image: unrolled, nothing recomputed.

    XLA counts what a loop repeats once.
    """
    config = changed(config, {"run.unroll": True, "run.remat": "none", "run.attention": "xla"})
    stage = make_stage(config)
    params, frozen = _plain_shapes(stage)

    def loss(params: Any, frozen: Any, batch: Any, key: jax.Array) -> Any:
        return stage.loss(params, frozen, batch, key, jnp.zeros((), jnp.int32))

    gradient = jax.jit(jax.grad(loss, has_aux=True))
    lowered = gradient.lower(params, frozen, batch_shapes(config, 1), jax.random.key(0))
    analysis: Any = lowered.cost_analysis()
    return float(analysis["flops"])


def enough_parts(rows: int, parts: int, memory: Memory, limit: float) -> int:
    """Estimate from a measured step into how many more parts to split a batch to fit.

    Args:
      rows: of a device in a batch.
      parts: that these were summed up in.
      memory: that this took.
      limit: bytes of a device that may be used.

    Returns:
      The value for `train.accumulate`; 0 where not even parts of one row would do.
    """
    # Activations shrink with the rows of a part, gradients do not.
    fixed = memory.kept + memory.batch + 2 * memory.average
    shares = [2**n for n in range(1, 21) if rows // parts % 2**n == 0]
    return next((parts * n for n in shares if fixed + memory.working / n <= limit), 0)


def find_remedies(
    config: Config, mesh: jax.sharding.Mesh, memory: Memory, limit: float
) -> list[tuple[dict[str, Any], Memory]]:
    """Compile changes of a config that does not fit, the cheapest first, until one fits.

    Args:
      config: as it is.
      mesh: of the plan.
      memory: that it needs.
      limit: bytes of a device that may be used.

    Returns:
      Changed keys, and the memory then, of each that was tried.
    """
    tried: list[tuple[dict[str, Any], Memory]] = []

    def attempt(changes: dict[str, Any]) -> Memory:
        other = changed(config, changes)
        devices = list(mesh.devices.flat)
        tried.append((changes, measure(other, sharding.make_mesh(other.mesh, devices))[0]))
        return tried[-1][1]

    recompute = {} if config.run.remat == "full" else {"run.remat": "full"}
    layouts: list[dict[str, Any]] = [{}]
    if mesh.shape["fsdp"] == 1 and mesh.shape["data"] > 1:
        layouts.append({"mesh.data": 1, "mesh.fsdp": -1})
    rows = config.train.batch_size // sharding.batch_parts(mesh)
    for layout in layouts:
        changes, parts = {**recompute, **layout}, config.train.accumulate
        if changes:
            memory = attempt(changes)
        for _ in range(ATTEMPTS):
            parts = enough_parts(rows, parts, memory, limit)
            if memory.total <= limit or not parts:
                break
            memory = attempt({**changes, "train.accumulate": parts})
        if memory.total <= limit:
            break
    return tried


def make_plan(config: Config) -> Plan:
    """Measure a config on the devices that there are, see `imitate_devices`.

    Raises:
      UserError: a key of the `plan` section is out of range, or the sizes do not fit each other.
    """
    check_values(config)
    wanted = config.plan
    # What no CPU can compile or would take, by what takes as much memory.
    linear = dict.fromkeys(("auto", "", "cudnn", "flash"), "blocks")
    stand_in = {**linear, "float16": "bfloat16"}
    run = {f"run.{key}": stand_in[v] for key, v in config.run.items() if v in stand_in}
    config = changed(config, run)
    memory_gb = wanted.memory_gb or flops.CHIPS[wanted.chip].memory_gb
    limit = USABLE * memory_gb * 1e9
    devices = jax.devices()[: wanted.devices]
    mesh = sharding.make_mesh(config.mesh, devices)
    begin = time.perf_counter()
    memory, state, frozen = measure(config, mesh)
    seconds = time.perf_counter() - begin
    tried = []
    if memory.total > limit:
        tried = find_remedies(config, mesh, memory, limit)
    return Plan(
        memory=memory,
        limit=limit,
        compile_seconds=seconds,
        mesh=dict(mesh.shape),
        trained=parameter_count(state.params),
        frozen=parameter_count(frozen),
        checkpoint=size(state),
        flops=flops.training(config),
        xla_flops=xla_flops(config),
        remedies=tuple(tried),
    )
