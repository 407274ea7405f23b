import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from instella_jax.models import functional
from instella_jax.models.ar_transformer import ArTransformer
from instella_jax.models.diffusion_transformer import DiffusionTransformer
from instella_jax.models.layers import Execution, unstack
from instella_jax.runtime import sharding
from instella_jax.sampling import loops
from tests import uncached

SIZES = dict(num_layers=2, num_heads=2, head_dim=8, num_tokens=6, bits=5, text_width=12)
DIFFUSION, AR = DiffusionTransformer(**SIZES), ArTransformer(**SIZES)
SEEDS = jnp.arange(3) + 10


@functools.cache
def params(network):
    z = jnp.zeros((1, 6, 5))
    text, mask = jnp.zeros((2, 1, 1, 12)), jnp.ones((1, 1))
    inputs = (z, jnp.zeros(1), text, mask) if network is DIFFUSION else (z[:, 1:], text, mask)
    drawn = nn.unbox(jax.jit(network.init)(jax.random.key(0), *inputs))["params"]
    # Far from the initial values, where hardly anything depends on anything.
    return jax.tree.map(
        lambda x: x + 0.3 * jax.random.normal(jax.random.key(x.size), x.shape), drawn
    )


def prompts(batch, length=4):
    """Features of 2 * batch prompts, the latter half empty; real tokens at the end."""
    text = jax.random.normal(jax.random.key(1), (2, 2 * batch, length, 12))
    real = np.arange(batch) % length + 1
    mask = np.arange(length) >= length - real[:, None]
    return text, jnp.asarray(np.concatenate([mask, np.zeros_like(mask)]))


def rows(text, mask, chosen):
    index = np.concatenate([chosen, np.asarray(chosen) + mask.shape[0] // 2])
    return text[:, index], mask[index]


def uniforms_of(seed, number):
    """Draw `number` of the image of a seed, by jax.random."""
    key = jax.random.fold_in(jax.random.key(seed), number)
    return np.asarray(jax.random.uniform(key, (6, 5)), np.float64)


@functools.cache
def forward(network):
    return jax.jit(functools.partial(network.apply, {"params": params(network)}))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def diffusion_by_hand(text, mask, seeds, steps, guidance, temperature, rho, protocol, target):
    """The published sampler in numpy: bits, and how close a draw came to its probability."""
    z = np.stack([uniforms_of(seed, 0) < 0.5 for seed in seeds]).astype(np.float64)
    closest = 1.0
    for index in range(steps):
        t, later = ((1 - i / steps) ** rho for i in (index, index + 1))
        output = forward(DIFFUSION)(
            np.concatenate([z, z]).astype(np.float32),
            np.full(2 * len(z), t, np.float32), text, mask,
        )  # fmt: skip
        output = np.asarray(output, np.float64)
        both = np.concatenate([z, z])
        flip = output if target == "epsilon" else np.where(both == 1, -output, output)
        conditional, unconditional = np.split(flip, 2)
        flip = sigmoid(((1 + guidance) * conditional - guidance * unconditional) / temperature)
        p = z * (1 - flip) + (1 - z) * flip
        if index == steps - 1:
            return p > 0.5, min(closest, np.abs(p - 0.5).min())
        if protocol == 1:
            following = p * (1 - later) + 0.5 * later
        else:
            weights = [
                (probability * (1 - later) + 0.5 * later) * (kept - (t - later) * (kept - 0.5))
                for probability, kept in ((1 - p, 1 - z), (p, z))
            ]
            following = weights[1] / (weights[0] + weights[1])
        draws = np.stack([uniforms_of(seed, index + 1) for seed in seeds])
        closest = min(closest, np.abs(draws - following).min())
        z = (draws < following).astype(np.float64)
    raise AssertionError("no step")


def ar_by_hand(text, mask, seeds, guidance, temperature):
    """Token after token, the whole sequence anew for each: see `diffusion_by_hand`."""
    bits, closest = np.zeros((len(seeds), 6, 5)), 1.0
    for token in range(6):
        both = np.concatenate([bits, bits])[:, :-1].astype(np.float32)
        logits = np.asarray(forward(AR)(both, text, mask), np.float64)[:, token]
        conditional, unconditional = np.split(logits, 2)
        p = sigmoid(((1 + guidance) * conditional - guidance * unconditional) / temperature)
        key = [jax.random.fold_in(jax.random.key(seed), token) for seed in seeds]
        draws = np.stack([np.asarray(jax.random.uniform(k, (5,)), np.float64) for k in key])
        closest = min(closest, np.abs(draws - p).min())
        bits[:, token] = draws < p
    return bits, closest


@pytest.mark.parametrize(
    ("protocol", "rho", "target"),
    [(1, 1.0, "epsilon"), (1, 2.5, "x"), (2, 0.4, "epsilon"), (2, 1.0, "x")],
)
def test_diffusion_samples_what_numpy_samples_from_the_same_seeds(protocol, rho, target):
    text, mask = prompts(3)
    seeds = [11, 5, 2**31 - 1]
    given = dict(steps=4, guidance=1.5, temperature=0.7, rho=rho, protocol=protocol, target=target)
    wanted, closest = diffusion_by_hand(text, mask, seeds, **given)
    assert closest > 1e-5  # so that rounding decides no bit
    keys = loops.image_keys(jnp.asarray(seeds, jnp.uint32))
    bits = loops.sample_diffusion(DIFFUSION, params(DIFFUSION), text, mask, keys, **given)
    np.testing.assert_array_equal(bits, wanted)


def test_ar_samples_what_numpy_samples_from_the_same_seeds():
    text, mask = prompts(3)
    seeds = [11, 5, 2**31 - 1]
    given = dict(guidance=1.5, temperature=0.7)
    wanted, closest = ar_by_hand(text, mask, seeds, **given)
    assert closest > 1e-5
    keys = loops.image_keys(jnp.asarray(seeds, jnp.uint32))
    bits = loops.sample_ar(AR, params(AR), text, mask, keys, **given)
    np.testing.assert_array_equal(bits, wanted)


SAMPLERS = {
    "diffusion_1": functools.partial(loops.sample_diffusion, DIFFUSION, protocol=1, steps=5),
    "diffusion_2": functools.partial(loops.sample_diffusion, DIFFUSION, protocol=2, steps=5),
    "ar": functools.partial(loops.sample_ar, AR),
}
EACH = pytest.mark.parametrize("name", SAMPLERS)


def sample(name, text, mask, seeds, **options):
    sampler = SAMPLERS[name]
    return np.asarray(
        sampler(params(sampler.args[0]), text, mask, loops.image_keys(seeds), **options)
    )


@pytest.mark.slow
@EACH
def test_an_image_does_not_depend_on_its_batch(name):
    text, mask = prompts(3)
    bits = sample(name, text, mask, SEEDS)
    assert bits.shape == (3, 6, 5) and set(np.unique(bits)) == {0.0, 1.0}
    assert not np.array_equal(bits[0], bits[1])
    # Nor on the length to which the prompts are padded, nor on who made the keys and values.
    chosen = np.array([2, 0])
    text, mask = rows(text, mask, chosen)
    text = jnp.pad(text, ((0, 0), (0, 0), (2, 0), (0, 0)), constant_values=3.0)
    network = SAMPLERS[name].args[0]
    text_kv = jax.jit(functools.partial(network.apply, method="text_kv"))(
        {"params": params(network)}, text
    )
    again = sample(name, text_kv, jnp.pad(mask, ((0, 0), (2, 0))), SEEDS[chosen])
    np.testing.assert_array_equal(again, bits[chosen])


@EACH
def test_seed_and_prompt_matter(name):
    text, mask = prompts(3)
    bits = sample(name, text, mask, SEEDS)
    assert (sample(name, text, mask, SEEDS + 1) != bits).any((1, 2)).all()
    assert (sample(name, -text, mask, SEEDS, guidance=5.0) != bits).any()


@EACH
def test_options_do_not_recompile(name):
    text, mask = prompts(3)
    function = loops.continue_ar if name == "ar" else SAMPLERS[name].func
    given = dict(guidance=7.5, temperature=1.0)
    options = [dict(guidance=2.0), dict(temperature=0.0)]
    if name != "ar":
        given |= dict(steps=5, rho=1.0)
        options += [dict(steps=3), dict(rho=1.5)]
    sample(name, text, mask, SEEDS, **given)
    compiled = function._cache_size()
    results = [sample(name, text, mask, SEEDS, **given | option) for option in options]
    assert function._cache_size() == compiled
    assert all((results[0] != r).any() for r in results[1:])


def test_ar_at_temperature_zero_takes_the_likelier_bits():
    text, mask = prompts(3)
    bits = sample("ar", text, mask, SEEDS, temperature=0.0, guidance=0.0)
    logits = forward(AR)(bits[:, :-1], text[:, :3], mask[:3])
    np.testing.assert_array_equal(bits, logits > 0)
    other = sample("ar", text, mask, SEEDS + 9, temperature=0.0, guidance=0.0)
    np.testing.assert_array_equal(bits, other)


def test_uniforms_are_independent_per_image_and_step():
    keys = loops.image_keys(SEEDS)
    first, second = (loops.random_uniforms(keys, index, (6, 5)) for index in (0, 1))
    values = np.concatenate([first.ravel(), second.ravel()])
    assert len(np.unique(values)) == values.size and 0 <= values.min() and values.max() < 1


def test_cache_gives_the_logits_of_the_whole_prefix():
    text, mask = prompts(3)
    z = (jax.random.uniform(jax.random.key(3), (6, 6, 5)) < 0.5).astype(jnp.float32)
    variables = {"params": params(AR)}
    whole = forward(AR)(z[:, :-1], text, mask)
    cache = jax.jit(functools.partial(AR.apply, method="start_cache"))(variables, text)
    step = jax.jit(functools.partial(AR.apply, method="step"))
    layers = unstack(params(AR)["blocks"])
    for n in range(6):
        logits, cache = step(variables, z[:, n - 1], n, cache, mask, layers)
        np.testing.assert_allclose(logits, whole[:, n], rtol=1e-5, atol=1e-5)


def test_cached_sampling_equals_uncached():
    text, mask = prompts(3)
    uniforms = jax.random.uniform(jax.random.key(5), (3, 6, 5))
    bits = sample("ar", text, mask, SEEDS, uniforms=uniforms, guidance=3.0, temperature=0.8)
    whole = jax.jit(functools.partial(uncached.sample_ar, AR))
    np.testing.assert_array_equal(bits, whole(params(AR), text, mask, uniforms, 3.0, 0.8))


UNROLLED = DIFFUSION.clone(run=Execution(unroll=True))


def test_unstacked_layers_give_the_bits_of_stacked_ones():
    text, mask = prompts(3)
    one, other = (
        loops.sample_diffusion(network, params(DIFFUSION), text, mask, loops.image_keys(SEEDS))
        for network in (DIFFUSION, UNROLLED)
    )
    np.testing.assert_array_equal(one, other)


def loops_of(jaxpr):
    """Every loop of a computation."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "while":
            yield equation
        for name in ("jaxpr", "body_jaxpr"):
            if name in equation.params:
                inner = equation.params[name]
                yield from loops_of(getattr(inner, "jaxpr", inner))


def shapes_that_steps_read(function, *inputs):
    """Shapes of what comes into the loops that hold no other one."""
    every = loops_of(jax.make_jaxpr(function)(*inputs).jaxpr)
    steps = [loop for loop in every if not any(loops_of(loop.params["body_jaxpr"].jaxpr))]
    return {x.aval.shape for loop in steps for x in loop.invars}


@pytest.mark.parametrize("name", ["scanned", "unrolled", "ar"])
def test_no_loop_reads_stacked_weights(name):
    """Every step would copy a slice for each layer; only a scan over the layers needs them."""
    network = {"scanned": DIFFUSION, "unrolled": UNROLLED, "ar": AR}[name]
    text, mask = prompts(3)
    weights = params(AR if name == "ar" else DIFFUSION)
    inputs = weights, text, mask, loops.image_keys(SEEDS)

    def ar(weights, text, mask, keys, code, *part):
        cache = loops.start_ar(AR, weights, text)
        return loops.continue_ar(AR, weights, cache, mask, keys, code, *part)

    if name == "ar":
        read = shapes_that_steps_read(ar, *inputs, jnp.zeros((3, 6, 5)), 0, 6)
    else:
        read = shapes_that_steps_read(functools.partial(loops.sample_diffusion, network), *inputs)
    mlp = weights["blocks"]["mlp"]["up"]["kernel"].shape
    assert (mlp in read) == (name == "scanned")
    assert (mlp[1:] in read) == (name != "scanned")


def test_no_step_of_diffusion_reads_what_makes_its_modulations():
    text, mask = prompts(3)
    weights = params(DIFFUSION)
    function = functools.partial(loops.sample_diffusion, UNROLLED)
    read = shapes_that_steps_read(function, weights, text, mask, loops.image_keys(SEEDS))
    of_block, of_output = (x["modulation"]["kernel"].shape for x in (weights["blocks"], weights))
    assert not read & {of_block, of_block[1:], of_output}
    assert (loops.CHUNK, of_output[1]) in read


def test_more_steps_than_a_chunk_has_are_what_numpy_samples():
    """Also in parts that begin and end within a chunk."""
    text, mask = prompts(3)
    seeds, steps = [11, 5, 2**31 - 1], loops.CHUNK + 8
    given = dict(steps=steps, guidance=1.5, temperature=0.7, rho=0.4, protocol=1, target="epsilon")
    wanted, closest = diffusion_by_hand(text, mask, seeds, **given)
    assert closest > 1e-5
    keys = loops.image_keys(jnp.asarray(seeds, jnp.uint32))
    sample = functools.partial(
        loops.sample_diffusion, DIFFUSION, params(DIFFUSION), text, mask, keys, **given
    )
    np.testing.assert_array_equal(sample(), wanted)
    bits = None
    for first, last in ((0, 5), (5, steps - 3), (steps - 3, steps - 2), (steps - 2, steps)):
        bits = sample(bits=bits, first=first, last=last)
    np.testing.assert_array_equal(bits, wanted)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["diffusion_1", "ar"])
def test_sharding_changes_no_bit(name):
    text, mask = prompts(4)
    seeds = jnp.arange(4)
    bits = sample(name, text, mask, seeds)
    network, function = SAMPLERS[name].args[0], SAMPLERS[name]
    mesh = sharding.make_mesh(dict(data=2, fsdp=2, tensor=2))
    with sharding.use(mesh):
        shardings = sharding.tree_shardings(functional.abstract_params(network), mesh)
        rows = sharding.batch_sharding(mesh)
        text = jax.device_put(text, sharding.batch_sharding(mesh, 1))
        mask, keys = jax.device_put((mask, loops.image_keys(seeds)), rows)
        sharded = function(jax.device_put(params(network), shardings), text, mask, keys)
    assert len(sharded.sharding.device_set) == 8
    np.testing.assert_array_equal(sharded, bits)
