"""The device mesh and the one table that maps logical axes to it.

Nobody else knows device axes: networks name logical axes on their parameters and activations.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from instella_jax.errors import UserError

AXES = ("dcn_data", "data", "fsdp", "tensor")
# Those that split a batch.
BATCH_AXES = AXES[:3]

# fsdp shards parameters and batch alike; tensor splits heads and MLP hidden units. Over dcn_data,
# the slow network between slices or nodes, nothing goes but the sums of gradients.
RULES = (
    ("batch", BATCH_AXES),
    ("embed", "fsdp"),
    ("heads", "tensor"),
    ("mlp", "tensor"),
    ("layers", None),
    ("sequence", None),
    ("width", None),
)


def make_mesh(sizes: Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh:
    """Build the (dcn_data, data, fsdp, tensor) mesh.

    Args:
      sizes: size of each axis; one may be -1, "the rest of the devices". Without dcn_data it is 1.
      devices: default: all of them.

    Raises:
      UserError: the sizes do not multiply to the number of devices, or dcn_data is not that of the
        slices or nodes.
    """
    devices = list(devices) if devices is not None else jax.devices()
    shape = [int(sizes.get(axis, 1)) for axis in AXES]
    fixed = math.prod(size for size in shape if size != -1)
    fits = shape.count(-1) <= 1 and all(size == -1 or size > 0 for size in shape)
    if fits and -1 in shape and len(devices) % fixed == 0:
        shape[shape.index(-1)] = len(devices) // fixed
    if -1 in shape or not fits or math.prod(shape) != len(devices):
        wanted = ", ".join(
            f"{axis}={int(sizes[axis])}" for axis in AXES if axis != "dcn_data" or axis in sizes
        )
        divisors = [n for n in range(1, len(devices) + 1) if len(devices) % n == 0]
        raise UserError(
            f"mesh {wanted} does not fit {len(devices)} device(s): the sizes must multiply to "
            f"{len(devices)} (one may be -1 for the rest); each must be one of {divisors}"
        )
    types = (AxisType.Auto,) * len(AXES)
    grid = _across_slices(shape, devices)
    if grid is not None:
        return Mesh(grid, AXES, axis_types=types)
    return jax.make_mesh(shape, AXES, axis_types=types, devices=devices)


def _across_slices(shape: Sequence[int], devices: Sequence[Any]) -> np.ndarray | None:
    """Return devices with the first axis over slices or nodes, None where all are in one.

    Raises:
      UserError: there is another number of them.
    """
    # What one network joins: slices of TPUs and nodes of GPUs, as jax tells them, else processes.
    slices = {getattr(d, "slice_index", None) for d in devices}
    processes = {d.process_index for d in devices}
    counts = {len(slices), len(processes)}
    if shape[0] == 1 or counts == {1}:
        return None
    if shape[0] not in counts:
        raise UserError(
            f"mesh.dcn_data is {shape[0]}, but the devices are in {len(slices)} slice(s) or "
            f"node(s) and {len(processes)} process(es): use one of {sorted(counts | {1})}"
        )
    return mesh_utils.create_hybrid_device_mesh(
        (1, *shape[1:]), (shape[0], 1, 1, 1), devices,
        process_is_granule=shape[0] != len(slices),
    )  # fmt: skip


@contextlib.contextmanager
def use(mesh: Mesh) -> Iterator[None]:
    """Set the mesh and the rules for everything that is traced inside."""
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        yield


def constrain(x: jax.Array) -> jax.Array:
    """Keep activations [B, T, D] sharded over the batch alone, where a mesh is set.

    A batch that does not split evenly, such as a handful of prompts, is left to the compiler.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or x.shape[0] % batch_parts(mesh):
        return x
    return nn.with_logical_constraint(x, ("batch", "sequence", "width"))


def share_layers(function: Callable[[Any], Any], tree: Any) -> Any:
    """Apply a function to arrays [layers, ...], on a data mesh each device to its share of layers.

    On other meshes, which divide the layers themselves, and where the devices do not divide the
    number of layers, all is left to the compiler.

    Args:
      function: treats every layer by itself and keeps the shapes.
      tree: of arrays that all devices hold in full.
    """
    mesh = jax.sharding.get_abstract_mesh()
    arrays, structure = jax.tree.flatten(tree)
    parts = 1 if mesh.empty or mesh.size != mesh.shape["data"] else mesh.size
    if parts == 1 or not arrays or any(x.shape[0] % parts for x in arrays):
        return function(tree)
    counts = [x.shape[0] // parts for x in arrays]

    def of_one_device(*whole: jax.Array) -> jax.Array:
        number = jax.lax.axis_index("data")
        shares = [
            jax.lax.dynamic_slice_in_dim(x, number * n, n)
            for x, n in zip(whole, counts, strict=True)
        ]
        done = jax.tree.leaves(function(structure.unflatten(shares)))
        # One row of all, so that one collective brings them together: a CPU has a thread for one.
        row = jnp.concatenate([x.reshape(-1) for x in done])
        return jax.lax.all_gather(row, "data")

    # Arrays that came divided would make the compiler divide what they are made of, too.
    rows = jax.shard_map(of_one_device, in_specs=P(), out_specs=P(), check_vma=False)(*arrays)
    ends = np.cumsum([x.size // parts for x in arrays])[:-1]
    pieces = jnp.split(rows, ends, axis=1)
    return structure.unflatten([y.reshape(x.shape) for x, y in zip(arrays, pieces, strict=True)])


def arrays(batch: dict[str, Any]) -> dict[str, np.ndarray]:
    """Return the arrays of a batch, which go to the devices; texts stay on the host."""
    return {k: v for k, v in batch.items() if isinstance(v, np.ndarray)}


def batch_sharding(mesh: Mesh, leading: int = 0) -> NamedSharding:
    """Return sharding of a batch over BATCH_AXES, its batch axis being number `leading`."""
    return NamedSharding(mesh, P(*(None,) * leading, BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the same value on every device."""
    return NamedSharding(mesh, P())


def batch_parts(mesh: Mesh | AbstractMesh) -> int:
    """Return into how many parts a batch is split."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def place(tree: Any, sharding: NamedSharding) -> Any:
    """Make global arrays of this process's rows of a batch (all of them, with one process)."""
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), tree)


def values(boxed: Any) -> Any:
    """Take the logical axes off a tree; unlike `nn.unbox`, it constrains nothing."""
    return jax.tree.map(
        lambda x: x.value if isinstance(x, nn.Partitioned) else x,
        boxed,
        is_leaf=lambda x: isinstance(x, nn.Partitioned),
    )


def place_copy(tree: Any, mesh: Mesh) -> Any:
    """Spread a batch that every process holds in full over the devices, if it splits evenly."""

    def put(x: Any) -> jax.Array:
        even = x.shape[0] % batch_parts(mesh) == 0
        return jax.device_put(x, batch_sharding(mesh) if even else replicated(mesh))

    return jax.tree.map(put, tree)


def fetch(tree: Any) -> Any:
    """Copy arrays to the host, also those that are spread over other processes.

    With several processes all of them must call it.
    """
    if jax.process_count() == 1:
        return jax.device_get(tree)
    from jax.experimental import multihost_utils

    def gather(x: jax.Array) -> Any:
        whole = x.is_fully_addressable or x.is_fully_replicated
        return jax.device_get(x) if whole else multihost_utils.process_allgather(x, tiled=True)

    return jax.tree.map(gather, tree)


def tree_shardings(boxed: Any, mesh: Mesh) -> Any:
    """Return shardings of a tree of (boxed) abstract parameters by their logical axes.

    An axis that its mesh axis does not divide stays whole.
    """

    def fit(array: Any, names: tuple[str | None, ...]) -> NamedSharding:
        parts, spec = [], nn.logical_to_mesh_axes(names, RULES) or ()
        for size, axis in zip(array.shape, spec, strict=False):
            axes = (axis,) if isinstance(axis, str) else tuple(axis or ())
            parts.append(axis if size % math.prod(mesh.shape[n] for n in axes) == 0 else None)
        return NamedSharding(mesh, P(*parts))

    def fit_all(leaf: Any) -> Any:
        boxed = isinstance(leaf, nn.Partitioned)
        # An optimizer that leaves a parameter to another one has nothing in its box.
        return jax.tree.map(
            lambda array: fit(array, leaf.names if boxed else ()), leaf.value if boxed else leaf
        )

    return jax.tree.map(fit_all, boxed, is_leaf=lambda x: isinstance(x, nn.Partitioned))


def placed(boxed: Any, mesh: Mesh) -> Any:
    """Return shapes of a tree of (boxed) abstract parameters, each with its sharding."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        values(boxed),
        tree_shardings(boxed, mesh),
    )


def sharded_init(init: Callable[[jax.Array], Any], key: jax.Array, mesh: Mesh) -> Any:
    """Run `init(key)`, a tree with logical axes, each leaf made directly where it will live."""
    init = jax.jit(init)  # so that it is traced once for both
    with jax.set_mesh(mesh):
        shardings = tree_shardings(jax.eval_shape(init, key), mesh)
        return jax.jit(lambda k: values(init(k)), out_shardings=shardings)(key)
