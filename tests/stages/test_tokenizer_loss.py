"""What the tokenizer's stage computes of a batch, against numpy; the network is a stand-in."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from instella_jax.models.tokenizer import TokenizerNetwork
from instella_jax.stages import make_stage
from instella_jax.stages.tokenizer import reconstruct

ROWS, N, K, SIDE = 64, 4, 8, 32
KEY = jax.random.key(4)
PARAMS = {"tokenizer": {"gain": jnp.float32(1.0)}}


class Known(TokenizerNetwork):
    """Logits are the picture's mean by the weights, a code's picture is as light as its bits."""

    def setup(self):
        """Have one parameter, of the encoder."""
        self.gain = self.param("gain", lambda key: jnp.float32(1.0))

    def encode(self, images):
        return (
            self.gain
            * jnp.asarray(weights(), jnp.float32)[None]
            * images.mean((1, 2, 3))[:, None, None]
        )

    def decode(self, code, height, width):
        shade = 5 * code.mean((1, 2)) - 2
        return jnp.broadcast_to(shade[:, None, None, None], (len(code), height, width, 3))


def weights():
    return np.linspace(-3, 3, N * K).reshape(N, K)


def stage_of(config, **loss):
    config = config.copy_and_resolve_references()
    config.loss.update(loss)
    config.init_from = "somewhere" if config.loss.freeze_encoder else ""
    stage = make_stage(config)
    stage.network = Known(stage.sizes, stage.network.run)
    return stage


def pictures():
    """Grey pictures of all shades: uint8, and as floats."""
    shades = np.arange(ROWS) * 255 // (ROWS - 1)
    images = np.broadcast_to(shades[:, None, None, None], (ROWS, SIDE, SIDE, 3)).astype(np.uint8)
    return {"image": jnp.asarray(images)}, images / 127.5 - 1


def logits_of(x):
    return weights() * x.mean((1, 2, 3))[:, None, None]


def decoded(code, x):
    return np.broadcast_to((5 * code.mean((1, 2)) - 2)[:, None, None, None], x.shape)


def smooth_l1(a, b):
    error = np.abs(a - b)
    assert (error > 1.2).mean() > 0.05 and (error < 0.8).mean() > 0.05
    return np.where(error < 1, error**2 / 2, error - 0.5).mean()


def decibels(a, b):
    """PSNR of pictures in [-1, 1], whose peak is 2."""
    return np.mean(
        [20 * np.log10(2 / np.sqrt(np.mean((p - q) ** 2))) for p, q in zip(a, b, strict=True)]
    )


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


@pytest.mark.parametrize(
    ("step", "temperature"), [(0, 0.8), (5, 0.7), (15, 0.5), (20, 0.4), (2_000, 0.4)]
)
def test_the_loss_is_that_of_numpy(tiny_tokenizer_config, step, temperature):
    schedule = dict(start=0.8, end=0.4, steps=20)
    stage = stage_of(
        tiny_tokenizer_config, code=dict(weight=0.3, start=0, warmup=0), temperature=schedule
    )
    batch, x = pictures()
    loss, metrics = stage.loss(PARAMS, {}, batch, KEY, jnp.int32(step))
    logits = logits_of(x)
    draws = np.asarray(jax.random.uniform(KEY, (ROWS, N, K)))
    p = sigmoid(logits / temperature)
    assert np.abs(draws - p).min() > 1e-6
    picture = decoded((draws < p).astype(float), x)
    certainty = np.mean(sigmoid(logits) * (1 - sigmoid(logits)))
    pixel = smooth_l1(picture, x)
    assert float(metrics["pixel"]) == pytest.approx(pixel, rel=1e-4)
    assert float(metrics["code_loss"]) == pytest.approx(certainty, rel=1e-4)
    assert float(metrics["psnr"]) == pytest.approx(decibels(picture, x), rel=1e-4)
    assert float(loss) == pytest.approx(pixel + 0.3 * certainty, rel=1e-4)


def test_held_out_pictures_go_through_hard_bits_and_are_clipped(tiny_tokenizer_config):
    batch, x = pictures()
    metrics = stage_of(tiny_tokenizer_config).evaluate(PARAMS, {}, batch, KEY)
    code = (logits_of(x) > 0).astype(float)
    picture = decoded(code, x)
    assert np.abs(picture).max() <= 1  # half of the bits are on in each
    assert float(metrics["psnr"]) == pytest.approx(decibels(picture, x), rel=1e-4)
    assert float(metrics["bits_on"]) == pytest.approx(code.mean())


def test_codes_of_fewer_tokens_are_measured_where_they_are_trained(tiny_tokenizer_config):
    batch, x = pictures()
    assert "psnr_half" not in stage_of(tiny_tokenizer_config).evaluate(PARAMS, {}, batch, KEY)
    metrics = stage_of(tiny_tokenizer_config, tail_drop=0.5).evaluate(PARAMS, {}, batch, KEY)
    for name, kept in (("psnr_half", N // 2), ("psnr_quarter", N // 4)):
        code = (logits_of(x) > 0).astype(float)
        code[:, kept:] = 0
        wanted = decibels(decoded(code, x).clip(-1, 1), x)
        assert float(metrics[name]) == pytest.approx(wanted, rel=1e-4)


def test_what_lies_outside_of_the_range_is_clipped_before_it_is_measured(tiny_tokenizer_config):
    class Bright(Known):
        def decode(self, code, height, width):
            return super().decode(code, height, width) * 0 - 3.0

    stage = stage_of(tiny_tokenizer_config)
    stage.network = Bright(stage.sizes, stage.network.run)
    images, x = pictures()[0]["image"][1:], pictures()[1][1:]  # the first is black itself
    black = np.full_like(x, -1.0)
    metrics = stage.evaluate(PARAMS, {}, {"image": images}, KEY)
    assert float(metrics["loss"]) == pytest.approx(smooth_l1(black, x), rel=1e-4)
    assert float(metrics["psnr"]) == pytest.approx(decibels(black, x), rel=1e-4)
    copies, quality = reconstruct(stage.network, PARAMS["tokenizer"], images)
    assert not np.asarray(copies).any()
    assert np.mean(quality) == pytest.approx(decibels(black, x), rel=1e-4)


def test_the_encoder_learns_unless_it_is_frozen(tiny_tokenizer_config):
    batch, x = pictures()

    def loss(params, stage):
        return stage.loss(params, {}, batch, KEY, jnp.int32(0))

    free = stage_of(tiny_tokenizer_config, code=dict(weight=0.3, start=0, warmup=0))
    frozen = stage_of(
        tiny_tokenizer_config, code=dict(weight=0.3, start=0, warmup=0), freeze_encoder=True
    )
    gradient = jax.grad(loss, has_aux=True)
    assert gradient(PARAMS, free)[0]["tokenizer"]["gain"] != 0
    grads, metrics = gradient(PARAMS, frozen)
    assert grads["tokenizer"]["gain"] == 0
    hard = decoded((logits_of(x) > 0).astype(float), x)
    assert float(metrics["psnr"]) == pytest.approx(decibels(hard, x), rel=1e-4)


def unweighted(name, x, key):
    """Each loss by numpy, of pictures whose bits are drawn at temperature 1."""
    logits = logits_of(x)
    p = sigmoid(logits)
    picture = decoded((np.asarray(jax.random.uniform(key, p.shape)) < p).astype(float), x)

    def entropy(p):
        return -(p * np.log2(p) + (1 - p) * np.log2(1 - p))

    return {
        "pixel": lambda: np.abs(picture - x).mean(),
        "code": lambda: (p * (1 - p)).mean(),
        "entropy": lambda: entropy(p).mean(),
        "balance": lambda: 1 - entropy(p.mean(0)).mean(),
        "perceptual": lambda: 3 * ((picture - x) ** 2).mean(),
    }[name]()


@pytest.mark.parametrize("name", ["pixel", "code", "entropy", "balance", "perceptual"])
def test_weight_start_and_warmup_of_each_loss_act(tiny_tokenizer_config, monkeypatch, name):
    def distance(params, a, b):
        return params * jnp.square(a - b).mean((1, 2, 3))

    monkeypatch.setattr("instella_jax.stages.tokenizer.lpips", distance)
    none = dict(weight=0.0, start=0, warmup=0)
    sections = {n: dict(none) for n in ("pixel", "code", "entropy", "balance", "perceptual")}
    sections["pixel"]["kind"] = "l1"
    sections[name].update(weight=0.7, start=5, warmup=4)
    schedule = dict(start=1.0, end=1.0, steps=1)
    stage = stage_of(tiny_tokenizer_config, temperature=schedule, **sections)
    # The dark ones alone, in which bits are on as often as not in no place.
    batch, x = {"image": pictures()[0]["image"][:16]}, pictures()[1][:16]
    value = unweighted(name, x, KEY)
    assert value > 1e-3
    run = jax.jit(lambda step: stage.loss(PARAMS, {"lpips": jnp.float32(3)}, batch, KEY, step)[0])
    found = [float(run(jnp.int32(step))) for step in (0, 4, 5, 6, 8, 9, 1_000)]
    wanted = [0.7 * value * rise for rise in (0, 0, 0, 0.25, 0.75, 1, 1)]
    assert found == pytest.approx(wanted, rel=1e-3, abs=1e-6)
