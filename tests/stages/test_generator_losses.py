"""What the stages of the generators compute of a batch, against numpy.

The networks are stand-ins that note what they are given and whose outputs are known.
"""

import dataclasses
import functools
import statistics

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from instella_jax.models.ar_transformer import ArTransformer
from instella_jax.models.diffusion_transformer import DiffusionTransformer
from instella_jax.models.functional import apply, init_params
from instella_jax.models.olmo import Olmo
from instella_jax.runtime import sharding
from instella_jax.stages import make_stage

N, K, LAYERS = 4, 8, 2  # of the tiny generators
ROWS = 512
STEP = jnp.int32(0)
# What the networks were given since the test began.
given = []


@pytest.fixture(autouse=True)
def nothing_given_yet():
    given.clear()


class KnownText(Olmo):
    """State i of caption token l is 100 i + the token's id, in every channel."""

    def __call__(self, ids, mask):
        given.append(dict(ids=ids, text_mask=mask))
        states = 100 * jnp.arange(LAYERS + 1)[:, None, None] + ids
        return jnp.broadcast_to(states[..., None], (*states.shape, 16)).astype(jnp.float32)


class KnownDiffusion(DiffusionTransformer):
    """Says 4 t - 2 of zeros and 1 - 3 t of ones, and another number for each bit."""

    def setup(self):
        """Have no parameters."""

    def __call__(self, z, t, text, mask):
        given.append(
            {
                name: jax.tree.map(np.asarray, x)
                for name, x in dict(z=z, t=t, text=text, mask=mask).items()
            }
        )
        return jnp.asarray(known_output(np.asarray(z), np.asarray(t)), jnp.float32)


class KnownAr(ArTransformer):
    """Says twice what each place of the code before it holds, less 1."""

    def setup(self):
        """Have no parameters."""

    def __call__(self, z, text, mask):
        given.append({name: np.asarray(x) for name, x in dict(z=z, text=text, mask=mask).items()})
        return 2 * jnp.concatenate([jnp.full_like(z[:, :1], 0.3), z], axis=1) - 1


def known_output(z, t):
    t = t[:, None, None]
    return np.where(z > 0.5, 1 - 3 * t, 4 * t - 2) + np.linspace(-0.5, 0.5, K)


def cross_entropy(logits, bits):
    p = 1 / (1 + np.exp(-np.asarray(logits, np.float64)))
    return -np.mean(bits * np.log(p) + (1 - bits) * np.log(1 - p))


def logit_normal(quantiles):
    normal = statistics.NormalDist()
    return np.array([1 / (1 + np.exp(-normal.inv_cdf(float(q)))) for q in quantiles])


def stand_in(config, network, **loss):
    """A stage on codes whose networks are known."""
    config = config.copy_and_resolve_references()
    config.data.kind = "codes"
    config.loss.update(loss)
    stage = make_stage(config)
    stage.text_network = KnownText(stage.text_sizes, stage.run)
    stage.network = network(**{f.name: getattr(stage.network, f.name) for f in
                               dataclasses.fields(DiffusionTransformer)
                               if f.name not in ("parent", "name")})  # fmt: skip
    return stage


def with_draws(config, draws):
    """The config on codes, with so many draws of each."""
    config = config.copy_and_resolve_references()
    config.data.kind = "codes"
    config.loss.draws = draws
    return config


@pytest.fixture
def diffusion(tiny_diffusion_config):
    return lambda **loss: stand_in(tiny_diffusion_config, KnownDiffusion, **loss)


@pytest.fixture
def ar(tiny_ar_config):
    return lambda **loss: stand_in(tiny_ar_config, KnownAr, **loss)


PARAMS = {"generator": {}, "text": {}}


def shaken(network):
    """Parameters far from the initial values, where hardly anything depends on anything."""
    initial = jax.jit(lambda key: sharding.values(init_params(network, key)))(jax.random.key(0))
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda x: x + 0.3 * rng.normal(size=x.shape).astype(np.float32), jax.device_get(initial)
    )


def batch(rows=ROWS):
    """Random codes, packed as the data are, and captions of 3 to 6 tokens; and the bits."""
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2, (rows, N, K))
    lengths = rng.integers(3, 7, rows)
    mask = np.arange(6) >= 6 - lengths[:, None]
    packed = np.packbits(bits.reshape(rows, -1), axis=-1)
    ids = rng.integers(1, 50, (rows, 6)).astype(np.int32)
    arrays = {"code": packed, "ids": ids, "mask": mask}
    return jax.tree.map(jnp.asarray, arrays), bits.astype(np.float64)


def draws_of(key, rows=ROWS):
    """The uniforms of a training step: of dropped captions, times and noise."""
    drop, rest = jax.random.split(key)
    time, noise = jax.random.split(rest)
    return (
        np.asarray(jax.random.uniform(drop, (rows,))),
        np.asarray(jax.random.uniform(time, (rows,))),
        np.asarray(jax.random.uniform(noise, (rows, N, K))),
    )


def noisy(bits, t, uniforms):
    """Bits at their times; and which of them the rounding of a probability cannot decide."""
    t = np.asarray(t, np.float64)[:, None, None]
    p = bits * (1 - t) + 0.5 * t
    return uniforms < p, np.abs(uniforms - p) > 1e-6


@pytest.mark.parametrize("target", ["epsilon", "x"])
@pytest.mark.parametrize(
    ("times", "shift"), [("logit_normal", 1.0), ("uniform", 1.0), ("logit_normal", 3.0)]
)
def test_the_diffusion_loss_is_that_of_numpy(diffusion, target, times, shift):
    stage = diffusion(target=target, times=times, time_shift=shift, caption_dropout=0.25)
    rows, bits = batch()
    loss, metrics = stage.loss(PARAMS, {}, rows, jax.random.key(3), STEP)
    dropped, quantiles, noise = draws_of(jax.random.key(3))
    _, seen = given
    np.testing.assert_array_equal(seen["mask"], rows["mask"] & (dropped >= 0.25)[:, None])
    t = quantiles if times == "uniform" else logit_normal(quantiles)
    t = shift * t / (1 + (shift - 1) * t)
    np.testing.assert_allclose(seen["t"], t, rtol=1e-4, atol=1e-6)
    z, decided = noisy(bits, t, noise)
    assert decided.mean() > 0.999
    np.testing.assert_array_equal((seen["z"] == 1)[decided], z[decided])
    output = known_output(seen["z"], seen["t"])
    logits = np.where((seen["z"] == 1) & (target == "epsilon"), -output, output)
    assert float(loss) == pytest.approx(cross_entropy(logits, bits), rel=1e-5)
    assert float(metrics["bit_accuracy"]) == pytest.approx(np.mean((logits > 0) == (bits == 1)))


def test_draws_of_one_code_have_their_own_noise_times_and_dropped_captions(diffusion):
    stage, (rows, bits) = diffusion(caption_dropout=0.25, draws=3), batch(64)
    loss, _ = stage.loss(PARAMS, {}, rows, jax.random.key(3), STEP)
    dropped, quantiles, noise = draws_of(jax.random.key(3), 3 * 64)
    text, seen = given
    # Encoded once for all draws.
    assert text["ids"].shape[0] == 64 and seen["text"].shape[1] == 64
    # Row 3 i + j is draw j of caption i.
    caption = np.repeat(np.arange(64), 3)
    np.testing.assert_array_equal(
        seen["mask"], np.asarray(rows["mask"])[caption] & (dropped >= 0.25)[:, None]
    )
    t = logit_normal(quantiles)
    np.testing.assert_allclose(seen["t"], t, rtol=1e-4, atol=1e-6)
    z, decided = noisy(bits[caption], t, noise)
    np.testing.assert_array_equal((seen["z"] == 1)[decided], z[decided])
    output = known_output(seen["z"], seen["t"])
    logits = np.where(seen["z"] == 1, -output, output)
    assert float(loss) == pytest.approx(cross_entropy(logits, bits[caption]), rel=1e-5)
    given.clear()
    stage.evaluate(PARAMS, {}, rows, jax.random.key(3))
    assert given[-1]["z"].shape[0] == 64


def test_draws_change_no_gradient_but_by_their_noise(tiny_diffusion_config):
    """Three draws are three rows with the same code and caption, in the real network."""
    stage = make_stage(with_draws(tiny_diffusion_config, 1))
    several = make_stage(with_draws(tiny_diffusion_config, 3))
    (rows, _), key = batch(4), jax.random.key(5)
    params = {"generator": shaken(stage.network), "text": shaken(stage.text_network)}
    repeated = jax.tree.map(lambda x: jnp.repeat(x, 3, axis=0), rows)
    one = jax.jit(jax.grad(lambda p: stage.loss(p, {}, repeated, key, STEP)[0]))(params)
    other = jax.jit(jax.grad(lambda p: several.loss(p, {}, rows, key, STEP)[0]))(params)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-3, atol=1e-5)


def test_held_out_diffusion_loss_has_spread_times_and_every_caption(diffusion):
    # The shift is of training alone.
    stage, (rows, bits) = diffusion(caption_dropout=1.0, time_shift=3.0), batch()
    metrics = stage.evaluate(PARAMS, {}, rows, jax.random.key(3))
    _, seen = given
    np.testing.assert_array_equal(seen["mask"], rows["mask"])
    np.testing.assert_allclose(
        seen["t"], logit_normal((np.arange(ROWS) + 0.5) / ROWS), rtol=1e-4, atol=1e-6
    )
    output = known_output(seen["z"], seen["t"])
    logits = np.where(seen["z"] == 1, -output, output)
    assert float(metrics["loss"]) == pytest.approx(cross_entropy(logits, bits), rel=1e-5)
    again = stage.evaluate(PARAMS, {}, rows, jax.random.key(3))
    assert again == metrics
    # Half of t of the bits are flipped, within four standard deviations.
    t = np.broadcast_to(seen["t"][:, None, None], bits.shape)
    spread = np.sqrt(np.sum(t / 2 * (1 - t / 2)))
    assert abs(np.sum(seen["z"] != bits) - np.sum(t / 2)) < 4 * spread


def test_the_ar_loss_is_that_of_numpy_and_sees_only_what_came_before(ar):
    stage, (rows, bits) = ar(caption_dropout=0.25), batch()
    loss, metrics = stage.loss(PARAMS, {}, rows, jax.random.key(3), STEP)
    dropped, *_ = draws_of(jax.random.key(3))
    _, seen = given
    np.testing.assert_array_equal(seen["mask"], rows["mask"] & (dropped >= 0.25)[:, None])
    np.testing.assert_array_equal(seen["z"], bits[:, :-1])
    logits = 2 * np.concatenate([np.full((ROWS, 1, K), 0.3), bits[:, :-1]], axis=1) - 1
    assert float(loss) == pytest.approx(cross_entropy(logits, bits), rel=1e-5)
    assert float(metrics["bit_accuracy"]) == pytest.approx(np.mean((logits > 0) == (bits == 1)))
    metrics = stage.evaluate(PARAMS, {}, rows, jax.random.key(5))
    assert float(metrics["loss"]) == pytest.approx(float(loss), rel=1e-6)
    np.testing.assert_array_equal(given[-1]["mask"], rows["mask"])


def test_the_bits_that_the_ar_network_sees_are_random_at_a_rate_of_each_image(ar):
    stage, (rows, bits) = ar(caption_dropout=0.25, bit_noise=0.4), batch()
    loss, _ = stage.loss(PARAMS, {}, rows, jax.random.key(3), STEP)
    _, rest = jax.random.split(jax.random.key(3))
    rate, noise = jax.random.split(rest)
    rates = 0.4 * np.asarray(jax.random.uniform(rate, (ROWS,)), np.float64)[:, None, None]
    seen, before = given[-1]["z"], bits[:, :-1]
    uniforms = np.asarray(jax.random.uniform(noise, before.shape))
    p = before * (1 - rates) + 0.5 * rates
    decided = np.abs(uniforms - p) > 1e-6
    assert decided.mean() > 0.999
    np.testing.assert_array_equal((seen == 1)[decided], (uniforms < p)[decided])
    # A tenth of the bits are others: half of the mean rate.
    assert np.mean(seen != before) == pytest.approx(0.1, abs=0.01)
    # What is asked for stays the clean code.
    logits = 2 * np.concatenate([np.full((ROWS, 1, K), 0.3), seen], axis=1) - 1
    assert float(loss) == pytest.approx(cross_entropy(logits, bits), rel=1e-5)
    stage.evaluate(PARAMS, {}, rows, jax.random.key(3))
    np.testing.assert_array_equal(given[-1]["z"], before)


@pytest.mark.parametrize("kind", ["diffusion", "ar"])
def test_block_i_sees_the_text_after_layer_i(kind, diffusion, ar):
    stage, (rows, _) = (diffusion if kind == "diffusion" else ar)(), batch()
    stage.loss(PARAMS, {}, rows, jax.random.key(0), STEP)
    text, seen = given
    np.testing.assert_array_equal(text["ids"], rows["ids"])
    # A dropped caption is read all the same: what of it is seen is masked afterwards.
    np.testing.assert_array_equal(text["text_mask"], rows["mask"])
    wanted = 100 * np.arange(1, LAYERS + 1)[:, None, None] + rows["ids"]
    np.testing.assert_array_equal(seen["text"], np.repeat(wanted[..., None], 16, axis=-1))


def test_only_the_text_of_the_last_block_is_normalised(tiny_diffusion_config):
    stage, (rows, _) = make_stage(tiny_diffusion_config), batch(8)
    params = {"text": shaken(stage.text_network)}
    text = np.asarray(jax.jit(stage.text_features)(params, {}, rows["ids"], rows["mask"]))
    assert text.shape == (LAYERS, 8, 6, 16)
    np.testing.assert_allclose(text[-1].mean(-1), 0, atol=1e-4)
    np.testing.assert_allclose(text[-1].std(-1), 1, atol=1e-3)
    assert np.abs(text[0].std(-1) - 1).mean() > 0.05


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.6, 1.0])
def test_captions_are_dropped_at_their_rate_whatever_the_noise(diffusion, rate):
    stage, (rows, bits) = diffusion(caption_dropout=rate), batch()
    kept, times, flipped, first = [], [], [], []
    for seed in range(16):
        given.clear()
        stage.loss(PARAMS, {}, rows, jax.random.key(seed), STEP)
        seen = given[1]
        whole = (seen["mask"] == rows["mask"]).all(-1)
        assert (whole | ~seen["mask"].any(-1)).all()
        kept.append(whole)
        times.append(seen["t"])
        flipped.append((seen["z"] != bits).mean((1, 2)))
        # As many draws as there are rows, counted from the first.
        first.append((seen["z"] != bits).ravel()[:ROWS])
    kept, times, flipped, first = map(np.concatenate, (kept, times, flipped, first))
    limit = 4 / np.sqrt(len(kept))
    assert abs(kept.mean() - (1 - rate)) <= limit * np.sqrt(rate * (1 - rate))
    if 0 < rate < 1:
        # Neither the times nor the noise know which captions are dropped, nor they of each other.
        for draws in (times, flipped, first):
            assert abs(np.corrcoef(kept, draws)[0, 1]) < limit
    assert abs(np.corrcoef(times, first)[0, 1]) < limit
    assert np.corrcoef(times, flipped)[0, 1] > 0.5


def test_times_reach_the_real_network(tiny_diffusion_config):
    stage, (rows, bits) = make_stage(tiny_diffusion_config), batch(2)
    network = stage.network
    forward = jax.jit(functools.partial(apply, network, shaken(network)))
    text, mask = np.ones((LAYERS, 2, 6, 16), np.float32), rows["mask"]
    z = bits.astype(np.float32)
    early = forward(z, np.float32([0.1, 0.1]), text, mask)
    mixed = forward(z, np.float32([0.1, 0.9]), text, mask)
    np.testing.assert_allclose(mixed[0], early[0], rtol=1e-5, atol=1e-6)
    assert np.abs(mixed[1] - early[1]).max() > 1e-2


def test_no_logit_of_the_ar_stage_depends_on_its_own_token_or_later_ones(tiny_ar_config):
    class Noted(ArTransformer):
        def __call__(self, z, text, mask):
            given.append(logits := super().__call__(z, text, mask))
            return logits

    stage = stand_in(tiny_ar_config, Noted, caption_dropout=0.0)
    rows, bits = batch(2)
    trained = {"generator": shaken(stage.network), "text": {}}

    @jax.jit
    def traced(packed):
        stage.loss(trained, {}, {**rows, "code": packed}, jax.random.key(0), STEP)
        return given.pop()

    def logits(bits):
        return np.asarray(traced(np.packbits(bits.astype(np.uint8).reshape(2, -1), axis=-1)))

    before = logits(bits)
    for token in range(N):
        changed = bits.copy()
        changed[:, token] = 1 - changed[:, token]
        after = logits(changed)
        np.testing.assert_allclose(
            after[:, : token + 1], before[:, : token + 1], rtol=1e-5, atol=1e-6
        )
        later = np.abs(after - before)[:, token + 1 :].max((0, 2))
        assert (later > 1e-3).all()
