"""One step of training, against second formulas in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from instella_jax.training.optimizer import make_optimizer, make_schedule
from instella_jax.training.step import ROUNDING, init_state, make_step, round_at_random
from tests.toy_stage import Points, ToyStage

OPTIMIZER = dict(
    kind="adamw",
    learning_rate=0.1, warmup_steps=0, schedule="constant", final_fraction=0.1, b1=0.8, b2=0.9,
    eps=1e-3, weight_decay=0.05, clip=1.0,
)  # fmt: skip


def make_config(optimizer=(), **train):
    defaults = dict(steps=100, accumulate=1, ema_decay=0.99, spike_norm=0.0)
    return ConfigDict(dict(optimizer={**OPTIMIZER, **dict(optimizer)}, train={**defaults, **train}))


def start(config, stage=None):
    """Returns a state and the compiled step."""
    stage = stage or ToyStage()
    optimizer = make_optimizer(config.optimizer, 100, stage.critics)
    state = init_state(stage.init(jax.random.key(1)), optimizer, jax.random.key(2))
    return state, jax.jit(make_step(stage, optimizer, config, lambda *_: {}))


def batches(count, size=8):
    """Batches [count, size, ...] of different points."""
    points = Points(count * size, seed=5)
    return {
        "x": points.x.reshape(count, size, -1),
        "y": points.y.reshape(count, size),
    }


def only(batch, index):
    return {name: values[index : index + 1] for name, values in batch.items()}


def run(step, state, batch):
    """Runs one call for each leading index; returns the states and metrics."""
    states, metrics = [], []
    for index in range(len(batch["y"])):
        state, metric = step(state, {}, only(batch, index))
        states.append(state)
        metrics.append(metric)
    return states, metrics


def host(tree):
    """Returns the leaves as numpy arrays, keys by their data."""
    return [
        np.asarray(jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x)
        for x in jax.tree.leaves(tree)
    ]


def trained(state):
    return host((state.params, state.ema, state.opt_state))


def assert_same(a, b, **tolerance):
    for x, y in zip(host(a), host(b), strict=True):
        if tolerance:
            np.testing.assert_allclose(x, y, **tolerance)
        else:
            np.testing.assert_array_equal(x, y)


def test_the_constant_schedule_warms_up_linearly():
    config = ConfigDict({**OPTIMIZER, "warmup_steps": 4})
    rates = [float(make_schedule(config, 100)(step)) for step in (0, 1, 2, 4, 5, 99)]
    np.testing.assert_allclose(rates, [0, 0.025, 0.05, 0.1, 0.1, 0.1], rtol=1e-6)


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_without_warm_up_the_first_rate_is_the_peak(schedule):
    config = ConfigDict({**OPTIMIZER, "schedule": schedule})
    assert make_schedule(config, 100)(0) == pytest.approx(0.1)


def test_the_cosine_schedule_ends_at_its_fraction():
    config = ConfigDict({**OPTIMIZER, "warmup_steps": 10, "schedule": "cosine"})
    steps = np.arange(10, 101)
    wanted = 0.1 * (0.1 + 0.9 * 0.5 * (1 + np.cos(np.pi * (steps - 10) / 90)))
    rates = jax.jit(make_schedule(config, 100))(steps)
    np.testing.assert_allclose(rates, wanted, rtol=1e-5)


def test_a_clip_of_0_is_no_clip():
    def moved(clip):
        state, step = start(make_config(dict(clip=clip)))
        return host(run(step, state, batches(1))[0][0].params)

    np.testing.assert_allclose(moved(0.0)[1], moved(1e9)[1], rtol=1e-6)
    # eps is large: a clipped gradient moves less.
    assert not np.allclose(moved(0.0)[1], moved(1e-3)[1], rtol=1e-3)


def test_parameters_follow_adamw_and_average_in_numpy():
    stage = ToyStage(noise=0.0)
    state, step = start(make_config(ema_decay=0.3), stage)
    batch = batches(6)
    w = np.append(*(np.asarray(state.params["line"][n], np.float64) for n in ("w", "b")))
    average, m, v = w.copy(), np.zeros(5), np.zeros(5)
    for index, (new, metrics) in enumerate(zip(*run(step, state, batch), strict=True)):
        x = np.concatenate([batch["x"][index], np.ones((8, 1))], axis=1)
        gradient = 2 / 8 * x.T @ (x @ w - batch["y"][index])
        norm = np.linalg.norm(gradient)
        np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-5)
        gradient *= min(1, 1 / norm)
        m, v = 0.8 * m + 0.2 * gradient, 0.9 * v + 0.1 * gradient**2
        t = index + 1
        direction = m / (1 - 0.8**t) / (np.sqrt(v / (1 - 0.9**t)) + 1e-3)
        w = w - 0.1 * (direction + 0.05 * w)
        decay = min(0.3, (1 + index) / (10 + index))
        average = decay * average + (1 - decay) * w
        for tree, wanted in ((new.params, w), (new.ema, average)):
            np.testing.assert_allclose(tree["line"]["w"], wanted[:4], rtol=1e-4, atol=1e-6)
            np.testing.assert_allclose(tree["line"]["b"], wanted[4], rtol=1e-4, atol=1e-6)


def test_accumulated_gradients_are_those_of_the_whole_batch():
    stage, batch = ToyStage(noise=0.0), batches(3)
    whole, whole_step = start(make_config(), stage)
    parts, parts_step = start(make_config(accumulate=4), stage)
    whole, whole_metrics = run(whole_step, whole, batch)
    parts, parts_metrics = run(parts_step, parts, batch)
    assert_same(whole, parts, rtol=1e-5, atol=1e-6)
    assert_same(whole_metrics, parts_metrics, rtol=1e-5, atol=1e-6)


def test_accumulated_parts_have_their_own_noise():
    class Drawn(ToyStage):
        def loss(self, params, frozen, batch, key, step):
            return 0 * params["line"]["b"] + jax.random.normal(key), {}

    state, step = start(make_config(accumulate=2), Drawn())
    _, metrics = step(state, {}, batches(1))
    key = jax.random.fold_in(jax.random.key(2), 0)
    wanted = np.mean([jax.random.normal(jax.random.fold_in(key, i)) for i in range(2)])
    np.testing.assert_allclose(metrics["loss"], wanted, rtol=1e-6)


def test_each_step_has_new_noise_and_the_same_step_the_same():
    state, step = start(make_config(optimizer=dict(learning_rate=0.0)))
    same = {k: np.repeat(v, 2, axis=0) for k, v in batches(1).items()}
    _, (first, second) = run(step, state, same)
    _, (again, _) = run(step, state, same)
    assert first["loss"] != second["loss"]
    assert first["loss"] == again["loss"]


def test_each_bfloat16_parameter_is_rounded_by_a_key_that_the_loss_never_gets():
    class Sum(ToyStage):
        def __init__(self, dtype):
            super().__init__()
            self.dtype = dtype

        def init(self, key):
            return {"line": {name: jnp.ones(512, self.dtype) for name in "ab"}}

        def loss(self, params, frozen, batch, key, step):
            return sum(x.astype(jnp.float32).sum() for x in jax.tree.leaves(params)), {}

    moved = {}
    for dtype in (jnp.float32, jnp.bfloat16):
        state, step = start(make_config(dict(learning_rate=1e-3)), Sum(dtype))
        moved[dtype] = step(state, {}, batches(1))[0].params["line"]
    # Of step 0; parts of a batch have their numbers in the place of ROUNDING.
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(2), 0), ROUNDING)
    assert ROUNDING > 2**30
    for number, name in enumerate("ab"):
        exact, rounded = moved[jnp.float32][name], moved[jnp.bfloat16][name]
        wanted = round_at_random(exact, jax.random.fold_in(key, number))
        np.testing.assert_array_equal(rounded, wanted)
        assert 0 < np.mean(np.asarray(rounded, np.float32) < exact) < 1


def test_a_batch_that_is_not_finite_changes_nothing_and_is_counted():
    state, step = start(make_config())
    batch = batches(4)
    batch["y"][1, 3] = np.nan
    batch["y"][2, 0] = np.inf
    (good, nan, inf, last), metrics = run(step, state, batch)
    for x, y, z in zip(trained(good), trained(nan), trained(inf), strict=True):
        np.testing.assert_array_equal(x, y)
        np.testing.assert_array_equal(x, z)
    assert [float(m["counts"]["skipped"]) for m in metrics] == [0, 1, 1, 0]
    assert [int(m["skipped_in_a_row"]) for m in metrics] == [0, 1, 2, 0]
    assert [int(s.step) for s in (good, nan, inf, last)] == [1, 2, 3, 4]
    assert all(np.isfinite(x).all() for x in host(last))
    assert any((x != y).any() for x, y in zip(trained(good), trained(last), strict=True))


def test_a_gradient_that_is_not_finite_changes_nothing():
    class Edge(ToyStage):
        def loss(self, params, frozen, batch, key, step):
            # The root is 0 where x is 0, its slope there infinite times 0.
            return jnp.sqrt(jnp.sum(jnp.square(batch["x"] @ params["line"]["w"]))), {}

    state, step = start(make_config(), Edge())
    batch = batches(1)
    after, metrics = step(state, {}, {**batch, "x": 0 * batch["x"]})
    assert metrics["loss"] == 0 and np.isnan(metrics["grad_norm"])
    assert metrics["counts"]["skipped"] == 1
    for x, y in zip(trained(state), trained(after), strict=True):
        np.testing.assert_array_equal(x, y)
    _, metrics = step(after, {}, batch)
    assert metrics["counts"]["skipped"] == 0


def test_a_gradient_spike_is_skipped_where_that_is_asked_for():
    state, step = start(make_config(spike_norm=50.0))
    batch = batches(2)
    batch["y"][1] *= 1e3
    (first, second), metrics = run(step, state, batch)
    assert [float(m["counts"]["skipped"]) for m in metrics] == [0, 1]
    assert float(metrics[0]["grad_norm"]) < 50 < float(metrics[1]["grad_norm"])
    assert_same(trained(first), trained(second))


def test_a_spike_is_what_exceeds_the_limit_and_no_less():
    state, step = start(make_config())
    norm = float(step(state, {}, batches(1))[1]["grad_norm"])
    for share, skipped in ((1.01, 0), (0.99, 1)):
        state, step = start(make_config(spike_norm=share * norm))
        assert step(state, {}, batches(1))[1]["counts"]["skipped"] == skipped


class Judged(ToyStage):
    """A line with a critic, whose gradient is 3, or no number; what it pays is counted as 0."""

    def __init__(self, finite):
        super().__init__(noise=0.0)
        self.finite, self.critics = finite, {"critic": optax.sgd(0.1)}

    def init(self, key):
        return {**super().init(key), "critic": jnp.ones(())}

    def loss(self, params, frozen, batch, key, step):
        loss, metrics = super().loss(params, frozen, batch, key, step)
        paid = params["critic"] - jax.lax.stop_gradient(params["critic"])
        # The slope of the root is infinite at 0, times 0.
        return loss + (3 * paid if self.finite else jnp.sqrt(jnp.square(paid))), metrics


def test_a_critic_has_a_norm_of_its_own():
    alone, alone_step = start(make_config(), ToyStage(noise=0.0))
    state, step = start(make_config(), Judged(finite=True))
    _, wanted = alone_step(alone, {}, batches(1))
    after, metrics = step(state, {}, batches(1))
    np.testing.assert_allclose(metrics["grad_norm"], wanted["grad_norm"], rtol=1e-6)
    assert metrics["grad_norm_critic"] == 3 and "grad_norm_line" not in metrics
    assert after.params["critic"] == pytest.approx(0.7)


def test_a_critic_without_a_finite_gradient_changes_nothing():
    state, step = start(make_config(), Judged(finite=False))
    after, metrics = step(state, {}, batches(1))
    assert np.isfinite(metrics["loss"]) and np.isfinite(metrics["grad_norm"])
    assert metrics["counts"]["skipped"] == 1
    assert_same(trained(state), trained(after))


def test_several_steps_in_a_call_are_as_many_calls():
    state, step = start(make_config())
    batch = batches(5)
    batch["y"][2] = np.nan
    states, metrics = run(step, state, batch)
    together, mean = step(state, {}, batch)
    assert_same(states[-1], together, rtol=1e-6, atol=1e-7)
    for name in ("loss", "bias", "grad_norm"):
        np.testing.assert_allclose(mean[name], np.mean([m[name] for m in metrics]), rtol=1e-6)
    assert int(mean["skipped_in_a_row"]) == 0 and int(mean["counts"]["skipped"]) == 1
