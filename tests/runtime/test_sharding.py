"""Meshes of eight devices against one device."""

import contextlib
import dataclasses
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from instella_jax.commands.evaluate import evaluate_config
from instella_jax.errors import UserError
from instella_jax.runtime import sharding
from instella_jax.sampling.sampler import Sampler
from instella_jax.stages import make_stage
from instella_jax.stages.base import init_stage
from instella_jax.stages.parameters import load_frozen
from instella_jax.training.optimizer import make_optimizer
from instella_jax.training.setup import check_sizes, initial_state
from instella_jax.training.step import init_state, jit_step
from instella_jax.weights.model_folder import ASSETS
from tests import collectives

MESHES = {
    "data": dict(data=8, fsdp=1, tensor=1),
    "pair": dict(data=2, fsdp=1, tensor=1),
    "fsdp": dict(data=1, fsdp=8, tensor=1),
    "tensor": dict(data=1, fsdp=1, tensor=2),
    "mixed": dict(data=2, fsdp=2, tensor=2),
    "slices": dict(dcn_data=2, data=1, fsdp=2, tensor=2),
}
ONE = dict(data=1, fsdp=1, tensor=1)


@pytest.fixture(scope="module", autouse=True)
def exact_products():
    with jax.default_matmul_precision("highest"):
        yield


def mesh_of(sizes):
    count = np.prod(list(sizes.values()))
    return sharding.make_mesh(sizes, jax.devices()[:count])


def first_state(config, sizes):
    """Returns the state before the first step on a mesh, made there."""
    mesh = mesh_of(sizes)
    with sharding.use(mesh):
        return initial_state(make_stage(config), config, mesh)[0]


def two_steps(config, sizes, state):
    """Moves a state to a mesh and runs two steps.

    Returns:
      The losses, the state after them and the compiled step as text.
    """
    mesh = mesh_of(sizes)
    stage = make_stage(config)
    optimizer = make_optimizer(config.optimizer, config.train.steps)

    def boxed(key):
        return init_state(init_stage(stage, key), optimizer, key)

    where = sharding.tree_shardings(jax.eval_shape(boxed, jax.random.key(0)), mesh)
    # A copy, since the step gives up what it gets.
    state = jax.tree.map(jnp.copy, jax.device_put(state, where))
    losses = []
    with (
        sharding.use(mesh),
        contextlib.closing(stage.loader("train", batch_size=8, steps_per_call=1)) as loader,
    ):
        frozen = load_frozen(stage, mesh)
        rows = sharding.batch_sharding(mesh, leading=1)
        batches = [sharding.place(sharding.arrays(next(loader)), rows) for _ in range(2)]
        step = jit_step(stage, optimizer, config, state)
        step = step.lower(state, frozen, batches[0]).compile()
        for batch in batches:
            state, metrics = step(state, frozen, batch)
            losses.append(float(metrics["loss"]))
    return losses, state, step.as_text()


def assert_close(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5, rtol=0)


@pytest.fixture(params=["tokenizer", "diffusion"])
def config(request):
    stage, _, optimizer = request.param.partition(" by ")
    config = request.getfixturevalue(f"tiny_{stage}_config")
    config.optimizer.kind = optimizer or "adamw"
    return config


@pytest.fixture(scope="module")
def known():
    """What has been worked out on one device, by stage."""
    return {}


@pytest.fixture
def on_one_device(config, known):
    """Initial state, and what `two_steps` returns."""
    key = config.stage, config.optimizer.kind
    if key not in known:
        initial = first_state(config, ONE)
        known[key] = (initial, *two_steps(config, ONE, initial))
    return known[key]


@pytest.mark.parametrize(
    ("config", "name"),
    [
        *itertools.product(["tokenizer"], ["data", "mixed", "slices"]),
        ("diffusion", "mixed"),
        pytest.param("ar", "mixed", marks=pytest.mark.thorough),
        pytest.param("tokenizer by muon", "mixed", marks=pytest.mark.thorough),
        pytest.param("tokenizer", "fsdp", marks=pytest.mark.thorough),
        pytest.param("tokenizer", "tensor", marks=pytest.mark.thorough),
        pytest.param("diffusion", "data", marks=pytest.mark.thorough),
        pytest.param("tokenizer by muon", "data", marks=pytest.mark.thorough),
        # Each device orthogonalises one of two layers.
        pytest.param("diffusion by muon", "pair", marks=pytest.mark.thorough),
    ],
    indirect=["config"],
)
def test_two_steps_are_those_of_one_device(config, on_one_device, name):
    initial, wanted, one, _ = on_one_device
    losses, state, compiled = two_steps(config, MESHES[name], initial)
    np.testing.assert_allclose(losses, wanted, atol=1e-5, rtol=0)
    assert_close(state.params, one.params)
    before, after = jax.tree.leaves(initial.params), jax.tree.leaves(one.params)
    assert max(np.abs(x - y).max() for x, y in zip(before, after, strict=True)) > 1e-4
    assert "all-reduce" in compiled
    if name in ("data", "pair"):  # For which a CPU has one thread a device.
        assert not collectives.at_once(compiled)
    if name == "slices":
        between = [kind for kind, groups in collectives.kinds(compiled) if across(groups, 4)]
        assert set(between) == {"all-reduce"}, between
        inside = [kind for kind, groups in collectives.kinds(compiled) if not across(groups, 4)]
        assert "all-gather" in inside


def across(groups, size):
    """Whether devices talk with those of another slice of so many devices."""
    return any(len({device // size for device in group}) > 1 for group in groups)


def test_initial_values_are_made_in_their_place_and_those_of_one_device(config, on_one_device):
    state = first_state(config, MESHES["fsdp"])
    assert_close(state.params, on_one_device[0].params)
    # Parameters, average and moments are all divided.
    for tree in (state.params, state.ema, state.opt_state):
        whole = sum(x.nbytes for x in jax.tree.leaves(tree))
        for device in jax.devices():
            assert bytes_on(device, tree) < whole / 8 * 1.5
    moments = [x.sharding for x in jax.tree.leaves(state.opt_state) if x.ndim]
    assert moments == 2 * [x.sharding for x in jax.tree.leaves(state.params)]


def bytes_on(device, tree):
    """Bytes that a device holds of a tree."""
    return sum(
        shard.data.nbytes
        for x in jax.tree.leaves(tree)
        if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
        for shard in x.addressable_shards
        if shard.device == device
    )


def test_tensor_divides_heads_and_hidden_units_only(tiny_tokenizer_config):
    stage = make_stage(tiny_tokenizer_config)
    boxed = jax.eval_shape(lambda key: init_stage(stage, key), jax.random.key(0))
    where = sharding.tree_shardings(boxed, mesh_of(MESHES["tensor"]))
    shapes = sharding.values(boxed)
    leaves = jax.tree.map(lambda x, s: (x.shape, s.shard_shape(x.shape)), shapes, where)
    split = {}
    for path, (shape, shard) in flatten_dict(leaves).items():
        if shape != shard:
            halved = [i for i, (a, b) in enumerate(zip(shape, shard, strict=True)) if a == 2 * b]
            split.setdefault(path[-2], []).extend(halved)
    # What reads heads or hidden units is split along its input, the others along their output.
    assert {name: set(axes) for name, axes in split.items()} == {
        **dict.fromkeys(("q", "k", "v", "gate", "up"), {2}),
        **dict.fromkeys(("o", "down"), {1}),
    }


def test_an_axis_that_does_not_divide_stays_whole():
    mesh = mesh_of(MESHES["fsdp"])
    boxed = {
        "even": nn.Partitioned(jnp.zeros((16, 6)), ("embed", "heads")),
        "odd": nn.Partitioned(jnp.zeros((12, 6)), ("embed", None)),
        "plain": jnp.zeros(3),
    }
    placed = jax.device_put(sharding.values(boxed), sharding.tree_shardings(boxed, mesh))
    shapes = {name: x.addressable_shards[0].data.shape for name, x in placed.items()}
    assert shapes == {"even": (2, 6), "odd": (12, 6), "plain": (3,)}


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [((1, 8, 1, 1), (1, 8, 1, 1)), ((1, -1, 2, 2), (1, 2, 2, 2)), ((1, 1, -1, 1), (1, 1, 8, 1)),
     ((2, -1, 1, 2), (2, 2, 1, 2))],
)  # fmt: skip
def test_the_rest_of_the_devices_fills_an_axis(sizes, shape):
    mesh = sharding.make_mesh(dict(zip(sharding.AXES, sizes, strict=True)))
    assert tuple(mesh.shape.values()) == shape


@pytest.mark.parametrize(
    "sizes", [(3, 1, 1), (-1, 3, 1), (-1, -1, 2), (0, 1, 1), (16, 1, 1), (2, 2, 1), (-2, 1, 1)]
)
def test_a_mesh_that_does_not_fit_is_named_with_what_would(sizes):
    with pytest.raises(UserError) as error:
        sharding.make_mesh(dict(zip(("data", "fsdp", "tensor"), sizes, strict=True)))
    message = str(error.value)
    assert message.startswith(f"mesh data={sizes[0]}, fsdp={sizes[1]}, tensor={sizes[2]} ")
    assert "does not fit 8 device(s)" in message and "[1, 2, 4, 8]" in message


@dataclasses.dataclass(frozen=True)
class Chip:
    """What jax says of a device of a cluster."""

    id: int
    process_index: int
    slice_index: int
    platform: str = "gpu"
    device_kind: str = "another"


def chips(slices, processes):
    """Eight chips, in no order, of so many slices and processes."""
    found = [Chip(i, i * processes // 8, i * slices // 8) for i in range(8)]
    return found[::2] + found[1::2]


@pytest.mark.parametrize(("slices", "processes"), [(2, 2), (2, 8), (1, 2)])
def test_the_first_axis_is_over_slices_or_nodes(slices, processes):
    sizes = dict(dcn_data=2, data=2, fsdp=-1, tensor=1)
    mesh = sharding.make_mesh(sizes, chips(slices, processes))
    assert dict(mesh.shape) == dict(dcn_data=2, data=2, fsdp=2, tensor=1)
    for half, numbers in zip(mesh.devices, ({0, 1, 2, 3}, {4, 5, 6, 7}), strict=True):
        assert {chip.id for chip in half.flat} == numbers


def test_another_number_of_slices_is_refused():
    with pytest.raises(UserError) as error:
        sharding.make_mesh(dict(dcn_data=4, data=2, fsdp=1, tensor=1), chips(2, 8))
    assert str(error.value) == (
        "mesh.dcn_data is 4, but the devices are in 2 slice(s) or node(s) and 8 process(es): use "
        "one of [1, 2, 8]"
    )


def tokenizer_heads(config):
    config.model.update(encoder_heads=4, decoder_heads=6)


def text_heads(config):
    config.text.model.update(num_attention_heads=4, num_key_value_heads=4)
    config.model.num_heads = 4
    config.text.model.num_key_value_heads = 1


def text_mlp(config):
    config.text.model.intermediate_size = 31


@pytest.mark.parametrize(
    ("stage", "change", "wrong", "fitting"),
    [
        ("tokenizer", tokenizer_heads, "6 decoder heads of the tokenizer", "[1, 2]"),
        ("diffusion", text_heads, "1 key and value heads of the text", "[1]"),
        ("ar", text_mlp, "31 hidden units of the MLP of the text", "[1]"),
    ],
)
def test_heads_and_hidden_units_that_do_not_split_are_named(stage, change, wrong, fitting, request):
    config = request.getfixturevalue(f"tiny_{stage}_config")
    change(config)
    config.train.batch_size = 8
    mesh = mesh_of(dict(data=2, fsdp=1, tensor=4))
    with pytest.raises(UserError) as error:
        check_sizes(config, mesh)
    message = str(error.value)
    assert wrong in message and message.endswith(f"tensor=4 parts: use one of {fitting}")
    assert "4 encoder heads" not in message


def test_a_network_that_does_not_split_is_neither_evaluated_nor_sampled_from(tiny_diffusion_config):
    config = tiny_diffusion_config
    config.mesh.update(data=2, tensor=4)
    with pytest.raises(UserError, match="2 heads of the generator, .* use one of .1, 2.$"):
        evaluate_config(config, None)
    mesh = mesh_of(dict(data=1, fsdp=1, tensor=8))
    with pytest.raises(UserError, match="4 heads of the generator"):
        Sampler.from_folder(
            ASSETS / "demo_ar",
            ASSETS / "demo_tokenizer",
            text_encoder=ASSETS / "demo_text",
            mesh=mesh,
        )
