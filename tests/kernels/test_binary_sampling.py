import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh
from jax.sharding import PartitionSpec as P

from instella_jax.errors import UserError
from instella_jax.kernels import binary_sampling
from instella_jax.models import binary_diffusion
from instella_jax.models.ar_transformer import ArTransformer
from instella_jax.models.diffusion_transformer import DiffusionTransformer
from instella_jax.runtime import sharding
from instella_jax.sampling import loops

INTERPRETED = [dict(implementation=name, interpret=True) for name in ("pallas_tpu", "pallas_gpu")]
KERNEL = pytest.mark.parametrize("how", INTERPRETED, ids=lambda how: how["implementation"])
PROTOCOL = pytest.mark.parametrize("protocol", binary_diffusion.PROTOCOLS)
# t, t_next, guidance, temperature, is_last
SETTINGS = {
    "plain": (0.7, 0.65, 7.5, 1.0, False),
    "first": (1.0, 0.95, 1.0, 0.5, False),
    "last": (0.05, 0.0, 2.0, 1.0, True),
    "no guidance": (0.3, 0.25, 0.0, 1.0, False),
    "cold": (0.3, 0.25, 3.0, 0.0, False),
}
DEVICES = {
    "tpu": ("TPU v5 lite", "tpu", "tpu_custom_call"),
    "cuda": ("NVIDIA H100 80GB HBM3", "gpu", "gpu.triton"),
    "rocm": ("gfx942", "gpu", "gpu.triton"),
}

diffusion_step = jax.jit(
    binary_sampling.diffusion_step,
    static_argnames=("protocol", "implementation", "block", "interpret"),
)
autoregressive_bits = jax.jit(
    binary_sampling.autoregressive_bits, static_argnames=("implementation", "block", "interpret")
)


def inputs(batch, shape, dtype=jnp.float32):
    """Logits, some of them very large, bits and keys."""
    keys = loops.image_keys(jnp.arange(batch) + 5)
    logits = 2 * np.random.default_rng(0).normal(size=(2, batch, *shape))
    extremes = np.array([0, 90, -90, 1e4, -1e4, 1e30, -1e30, 3e38, -3e38])
    flat = logits.reshape(2, -1)
    flat[0, : extremes.size], flat[1, 4 : 4 + extremes.size] = extremes, extremes
    z = np.random.default_rng(1).integers(0, 2, (batch, *shape))
    return jnp.asarray(logits, dtype), jnp.asarray(z, dtype), keys


def uniforms_of(keys, index, shape):
    """What each image's own key gives for one draw."""
    return jnp.stack([jax.random.uniform(jax.random.fold_in(k, index), shape) for k in keys])


@KERNEL
@pytest.mark.parametrize(
    ("shape", "dtype", "protocol"),
    [
        ((6, 7), jnp.float32, 1),
        ((6, 7), jnp.bfloat16, 2),
        ((16, 64), jnp.float32, 2),
        ((9, 128), jnp.bfloat16, 1),
    ],
    ids=str,
)
def test_step_equals_the_process_bit_for_bit(shape, dtype, protocol, how):
    logits, z, keys = inputs(3, shape, dtype)
    uniforms = uniforms_of(keys, 11, shape)
    process = jax.jit(binary_diffusion.sampling_step, static_argnames="protocol")
    for settings in SETTINGS.values():
        expected = process(*logits, z, *settings, uniforms, protocol=protocol)
        bits = diffusion_step(logits, z, keys, 11, *settings, protocol=protocol, **how)
        reference = diffusion_step(logits, z, keys, 11, *settings, protocol=protocol)
        assert bits.dtype == z.dtype and 0.1 < expected.mean() < 0.9
        np.testing.assert_array_equal(reference, expected)
        np.testing.assert_array_equal(bits, expected)


@KERNEL
@pytest.mark.parametrize(
    ("count", "dtype"), [(7, jnp.float32), (64, jnp.bfloat16), (128, jnp.float32)], ids=str
)
def test_autoregressive_bits_equal_the_reference(count, dtype, how):
    logits, _, keys = inputs(5, (count,), dtype)
    uniforms = uniforms_of(keys, 3, (count,))
    for guidance, temperature in ((0.0, 1.0), (9.0, 0.5), (2.0, 0.0)):
        expected = binary_diffusion.sample_bits(*logits, guidance, temperature, uniforms)
        for options in ({}, how):
            bits = autoregressive_bits(logits, keys, 3, guidance, temperature, **options)
            np.testing.assert_array_equal(bits, expected)


@pytest.mark.parametrize(
    ("how", "block"),
    [(INTERPRETED[0], rows) for rows in (8, 99)] + [(INTERPRETED[1], size) for size in (16, 512)],
    ids=str,
)
def test_any_block_gives_the_same_bits(how, block):
    logits, z, keys = inputs(2, (20, 7))
    expected = diffusion_step(logits, z, keys, 2, *SETTINGS["plain"])
    bits = diffusion_step(logits, z, keys, 2, *SETTINGS["plain"], block=block, **how)
    np.testing.assert_array_equal(bits, expected)


@pytest.mark.parametrize("how", [{}, *INTERPRETED], ids=str)
def test_sharded_equals_unsharded(how):
    logits, z, keys = inputs(16, (6, 7))
    step = functools.partial(binary_sampling.diffusion_step, protocol=2, **how)

    def run(step, batch):
        chosen = logits[:, :batch], z[:batch], keys[:batch]
        return jax.jit(step)(*chosen, 4, *SETTINGS["plain"])

    expected = diffusion_step(logits, z, keys, 4, *SETTINGS["plain"], protocol=2)
    mesh = sharding.make_mesh(dict(data=4, fsdp=2, tensor=1))
    rows = P(("data", "fsdp"))
    specs = (P(None, *rows), rows, rows, *[P()] * 6)
    by_hand = jax.shard_map(step, mesh=mesh, in_specs=specs, out_specs=rows, check_vma=False)
    np.testing.assert_array_equal(run(by_hand, 16), expected)
    with sharding.use(mesh):
        for batch in (16, 3):  # 3 images cannot be split among 8 devices
            bits = run(step, batch)
            np.testing.assert_array_equal(bits, expected[:batch])
        if how:
            assert run(step, 16).sharding.is_equivalent_to(sharding.batch_sharding(mesh), 3)


def test_threefry_is_that_of_jax_random():
    key = jax.random.key(7)
    words = tuple(jax.random.key_data(key))
    for data in (0, 1, 2**31 + 5, 2**32 - 1):
        ours = binary_sampling.threefry(words, jnp.uint32(0), jnp.uint32(data))
        np.testing.assert_array_equal(ours, jax.random.key_data(jax.random.fold_in(key, data)))


@pytest.mark.parametrize("how", [{}, INTERPRETED[1]], ids=["xla", "pallas"])
@PROTOCOL
def test_a_million_samples_have_the_probabilities_of_the_formula(protocol, how):
    shape, levels = (512, 128), np.array([-3.0, -1.0, 0.0, 0.5])
    keys = loops.image_keys(jnp.arange(16))
    flip = np.broadcast_to(levels[np.arange(128) % 4], (16, *shape))
    z = np.broadcast_to((np.arange(512) % 2)[:, None], (16, *shape)).astype(np.float32)
    t, t_next, guidance, temperature = 0.8, 0.5, 1.5, 2.0
    logits = jnp.asarray(np.stack([flip, 0.5 * flip]), jnp.float32)
    settings = (t, t_next, guidance, temperature, False)
    options = dict(protocol=protocol, **(how and dict(block=65536, **how)))
    bits, again = (
        np.asarray(diffusion_step(logits, z, keys, i, *settings, **options)) for i in (1, 2)
    )

    guided = ((1 + guidance) - guidance * 0.5) * levels / temperature
    flipped = 1 / (1 + np.exp(-guided))
    for old in (0, 1):
        clean = 1 - flipped if old else flipped
        p = clean * (1 - t_next) + 0.5 * t_next
        if protocol == 2:
            one = p * (old - (t - t_next) * (old - 0.5))
            p = one / (one + (1 - p) * ((1 - old) - (t - t_next) * (0.5 - old)))
        drawn = bits[:, old::2].reshape(-1, 32, 4)
        error = 5 * np.sqrt(p * (1 - p) / (drawn.size / 4))
        assert (np.abs(drawn.mean((0, 1)) - p) < error).all()

    # What is left after the mean has nothing to do with other images, neighbours and draws.
    classes = bits.reshape(16, 256, 2, 32, 4)
    means = np.broadcast_to(classes.mean((0, 1, 3), keepdims=True), classes.shape)
    rest, other = bits - means.reshape(bits.shape), again - means.reshape(bits.shape)
    for a, b in (
        (rest, other),
        (rest[1:], rest[:-1]),
        (rest[:, 1:], rest[:, :-1]),
        (rest[..., 1:], rest[..., :-1]),
    ):
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 5e-3


@pytest.mark.parametrize("how", [{}, *INTERPRETED], ids=str)
def test_temperature_zero_is_the_threshold_whatever_the_key(how):
    _, z, keys = inputs(4, (6, 7))
    logits = jax.random.normal(jax.random.key(1), (2, 4, 6, 7))
    conditional, unconditional = np.asarray(logits, np.float64)
    guided = 3 * conditional - 2 * unconditional
    bits = diffusion_step(logits, z, keys, 1, 0.5, 0.4, 2.0, 0.0, False, **how)
    np.testing.assert_array_equal(bits, np.where(guided > 0, 1 - z, z))
    bits = autoregressive_bits(logits[:, :, 1], keys, 1, 2.0, 0.0, **how)
    np.testing.assert_array_equal(bits, guided[:, 1] > 0)
    assert not autoregressive_bits(jnp.zeros((2, 4, 7)), keys, 1, 2.0, 0.0, **how).any()


def test_resolve_chooses_and_logs_once(caplog):
    binary_sampling.resolve.cache_clear()
    caplog.set_level(logging.INFO, binary_sampling.__name__)
    for _ in range(2):
        assert binary_sampling.resolve("auto", "tpu") == "xla"
    assert len(caplog.records) == 1
    assert binary_sampling.resolve("xla", "cpu") == "xla"
    assert binary_sampling.resolve("pallas", "tpu") == "pallas_tpu"
    assert {binary_sampling.resolve("pallas", p) for p in ("gpu", "cuda", "rocm")} == {"pallas_gpu"}
    with pytest.raises(UserError, match="not on cpu"):
        binary_sampling.resolve("pallas", "cpu")
    with pytest.raises(UserError, match="'triton': expected one of"):
        binary_sampling.resolve("triton", "gpu")


def test_kernels_refuse_keys_of_another_generator():
    logits, z, _ = inputs(2, (6, 7))
    keys = jax.random.split(jax.random.key(0, impl="rbg"), 2)
    with pytest.raises(UserError, match="threefry"):
        diffusion_step(logits, z, keys, 0, *SETTINGS["plain"], **INTERPRETED[0])


def equations(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in jax.tree.leaves(eqn.params, is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


def test_tpu_kernel_chooses_between_no_truth_values():
    # They pass the lowering, and then Mosaic's compiler fails on the device.
    logits, z, keys = inputs(2, (8, 64))
    step = functools.partial(diffusion_step, **INTERPRETED[0])
    calls = [
        jax.make_jaxpr(step)(logits, z, keys, 0, *SETTINGS["plain"]),
        jax.make_jaxpr(functools.partial(autoregressive_bits, **INTERPRETED[0]))(
            logits[:, :, 0], keys, 0, 1.0, 1.0
        ),
    ]
    for call in calls:
        selects = [e for e in equations(call.jaxpr) if e.primitive.name == "select_n"]
        assert len(selects) >= 2
        assert all(e.outvars[0].aval.dtype != jnp.bool_ for e in selects)


def lowered(platform, function, *args, **options):
    kind, family, call = DEVICES[platform]
    device = AbstractDevice(device_kind=kind, num_cores=1, platform=family)
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        text = function.trace(*args, **options).lower(lowering_platforms=(platform,)).as_text()
    return text.count(f'{call}"') + text.count(f"{call}(")


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")
@pytest.mark.parametrize("platform", DEVICES)
def test_lowers_for_devices_that_are_not_here(platform):
    how = binary_sampling.resolve("pallas", platform)
    for shape, dtype in (((6, 7), jnp.float32), ((128, 64), jnp.bfloat16)):
        logits, z, keys = inputs(3, shape, dtype)
        for protocol in binary_diffusion.PROTOCOLS:
            options = dict(protocol=protocol, implementation=how)
            args = logits, z, keys, 0, *SETTINGS["plain"]
            assert lowered(platform, diffusion_step, *args, **options) == 1
            assert lowered(platform, diffusion_step, *args, protocol=protocol) == 0
        args = logits[:, :, 0], keys, 0, 1.0, 1.0
        assert lowered(platform, autoregressive_bits, *args, implementation=how) == 1


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")
@pytest.mark.parametrize("platform", DEVICES)
def test_sampling_loops_lower_for_devices_that_are_not_here(platform):
    sizes = dict(num_layers=1, num_heads=2, head_dim=8, num_tokens=6, bits=7, text_width=12)
    diffusion, ar = DiffusionTransformer(**sizes), ArTransformer(**sizes)
    text, mask = jnp.zeros((1, 6, 4, 12)), jnp.ones((6, 4))
    keys = loops.image_keys(jnp.arange(3))
    z = jnp.zeros((6, 6, 7))
    whole_ar = jax.jit(loops.sample_ar, static_argnames=("network", "kernel"))
    for sampler, network, args in (
        (loops.sample_diffusion, diffusion, (z, jnp.zeros(6), text, mask)),
        (whole_ar, ar, (z[:, 1:], text, mask)),
    ):
        params = jax.eval_shape(network.init, jax.random.key(0), *args)["params"]
        how = dict(kernel=binary_sampling.resolve("pallas", platform))
        assert lowered(platform, sampler, network, params, text, mask, keys, **how) == 1
