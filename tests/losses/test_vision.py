"""Losses through a frozen DINOv2 against numpy, and what they teach."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from instella_jax.errors import UserError
from instella_jax.losses.vision import block_features, cosine_distance, patch_features
from instella_jax.losses.weighing import weigh_at
from instella_jax.models.functional import apply, init_params
from instella_jax.models.layers import Execution
from instella_jax.models.trunk import STATES
from instella_jax.models.vision_heads import FeatureDiscriminator
from instella_jax.runtime import sharding
from instella_jax.stages import make_stage
from instella_jax.stages.base import init_stage, without_critics
from instella_jax.weights.vision_folder import load_vision, make_vision
from tests import vision_folders

KEY = jax.random.key(5)
IMAGES = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3)).astype(np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dinov2")
    vision_folders.write(folder)
    return folder


@pytest.fixture(scope="module")
def vision(folder):
    network = make_vision(folder, Execution())
    return network, load_vision(folder, network)


def config_of(config, folder, **loss):
    config = config.copy_and_resolve_references()
    config.model.decoder_layers = 3
    config.loss.vision = str(folder)
    config.loss.update(loss)
    return config


def values(stage):
    """Its parameters, and those of the frozen network."""
    params = jax.jit(lambda key: sharding.values(init_stage(stage, key)))(KEY)
    return params, sharding.values(stage.frozen())


def distance(a, b):
    """Mean of 1 less the cosine, in float64."""
    a, b = (np.asarray(x, np.float64).reshape(-1, x.shape[-1]) for x in (a, b))
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return np.mean([1 - p @ q / length for p, q, length in zip(a, b, lengths, strict=True)])


def test_the_distance_is_that_of_numpy():
    a, b = np.random.default_rng(1).normal(size=(2, 3, 2, 5, 7)).astype(np.float32)
    found = cosine_distance(jnp.asarray(a), jnp.asarray(b))
    assert float(found) == pytest.approx(distance(a, b), rel=1e-5)
    assert float(cosine_distance(jnp.asarray(a), jnp.asarray(-3 * a))) == pytest.approx(2)
    zero = jnp.zeros((2, 3))
    assert np.isfinite(jax.grad(lambda x: cosine_distance(x, x + 1))(zero)).all()


def test_each_cell_of_the_grid_is_a_patch_of_the_resized_picture(vision):
    network, params = vision
    x = jnp.asarray(np.random.default_rng(2).uniform(-1, 1, (2, 32, 48, 3)), jnp.float32)
    found = patch_features(network, params, x, (2, 3))
    fitted = jax.image.resize(x, (2, 28, 42, 3), "cubic")
    last, states = apply(network, params, fitted)
    np.testing.assert_allclose(found.reshape(2, 6, -1), last[:, 1:], atol=1e-6)
    for count, chosen in ((1, [2]), (2, [0, 2]), (3, [0, 1, 2])):
        blocks = block_features(network, params, x, (2, 3), count)
        wanted = np.asarray(states)[chosen][:, :, 1:]
        np.testing.assert_allclose(blocks.reshape(wanted.shape), wanted, atol=1e-6)


def test_a_loss_at_its_inputs_has_the_gradient_of_the_loss_itself():
    section = ConfigDict(dict(weight=0.7, start=2, warmup=4))
    x = jnp.asarray(np.random.default_rng(3).normal(size=(4,)), jnp.float32)
    tree = {"a": x * 2}

    def loss(x, tree):
        return jnp.sum(x**2 * tree["a"])

    def total(x, tree, step):
        paid, value, pull = weigh_at((x, tree), section, loss, step)
        return paid, (value, pull)

    for step, weight in ((1, 0.0), (2, 0.0), (4, 0.35), (6, 0.7), (60, 0.7)):
        gradients, (value, pull) = jax.grad(total, (0, 1), has_aux=True)(x, tree, step)
        paid = total(x, tree, step)[0]
        assert float(paid) == pytest.approx(weight * float((x**3 * 2).sum()), rel=1e-5)
        np.testing.assert_allclose(gradients[0], weight * 2 * x * tree["a"], rtol=1e-5)
        np.testing.assert_allclose(gradients[1]["a"], weight * x**2, rtol=1e-5)
        length = np.linalg.norm(weight * 2 * x * tree["a"])
        assert float(pull) == pytest.approx(length, rel=1e-5)
        assert float(value) == pytest.approx(float((x**3 * 2).sum()) if step >= 2 else 0.0)


@pytest.mark.parametrize("unroll", [True, False])
@pytest.mark.parametrize("block", [0, 1, 2])
def test_the_states_are_those_after_the_block(tiny_tokenizer_config, folder, block, unroll):
    """A decoder that ends after the block has the same states at its end."""
    alignment = dict(weight=0.5, start=0, warmup=0, block=block)
    config = config_of(tiny_tokenizer_config, folder, alignment=alignment)
    config.run.unroll = unroll
    stage = make_stage(config)
    params, _ = values(stage)
    code = jax.random.bernoulli(KEY, 0.5, (2, 4, 8)).astype(jnp.float32)

    def decode(network, params):
        return network.apply({"params": params}, code, 32, 48, method="decode", mutable=[STATES])

    decoded, sown = decode(stage.network, params["tokenizer"])
    (states,) = sown[STATES]["decoder"]["trunk"]["tapped"]
    assert states.shape == (2, 2, 3, 16)
    plain = make_stage(config_of(tiny_tokenizer_config, ""))
    untapped = apply(plain.network, params["tokenizer"], code, 32, 48, method="decode")
    np.testing.assert_allclose(decoded, untapped, atol=1e-6)
    shorter = config_of(tiny_tokenizer_config, "")
    shorter.model.decoder_layers = block + 1
    cut = jax.tree.map(lambda x: x, params["tokenizer"])
    trunk = cut["decoder"]["trunk"]
    trunk["blocks_0"] = jax.tree.map(lambda x: x[: block + 1], trunk["blocks_0"])
    ends = apply(make_stage(shorter).network, cut, code, 32, 48, method="decode")
    # What its last layers make of the states.
    decoder = params["tokenizer"]["decoder"]
    x = np.asarray(states, np.float64)
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * decoder["out_norm"]["scale"]
    pixels = x @ decoder["pixels"]["kernel"] + decoder["pixels"]["bias"]
    picture = pixels.reshape(2, 2, 3, 16, 16, 3).transpose(0, 1, 3, 2, 4, 5).reshape(2, 32, 48, 3)
    np.testing.assert_allclose(ends, picture, atol=1e-5)


def head_by_numpy(head, x):
    """Linear, LayerNorm, ReLU, linear."""
    x = x @ head["hidden"]["kernel"] + head["hidden"]["bias"]
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    x = np.maximum(x * head["norm"]["scale"] + head["norm"]["bias"], 0)
    return x @ head["out"]["kernel"] + head["out"]["bias"]


@pytest.mark.thorough
def test_alignment_and_feature_distance_are_those_of_numpy(tiny_tokenizer_config, folder, vision):
    none = dict(weight=0.0)
    stage = make_stage(
        config_of(
            tiny_tokenizer_config, folder, pixel=none, code=none,
            alignment=dict(weight=0.5, start=2, warmup=4, block=1),
            features=dict(weight=0.3, start=1, warmup=2),
        )
    )  # fmt: skip
    params, frozen = values(stage)
    assert set(params) == {"tokenizer", "alignment"} == {*stage.critics, "tokenizer"}
    assert set(without_critics(stage, params)) == {"tokenizer"}
    batch = {"image": jnp.asarray(IMAGES)}
    loss = jax.jit(lambda step: stage.loss(params, frozen, batch, KEY, step))
    x = jnp.asarray(IMAGES, jnp.float32) / 127.5 - 1
    logits = apply(stage.network, params["tokenizer"], x, method="encode")
    draws = jax.random.bernoulli(KEY, jax.nn.sigmoid(logits / stage.temperature(9)))
    decoded, states = stage._decode_and_tap(params, draws.astype(jnp.float32), x)
    features = [np.asarray(patch_features(*vision, y, (2, 2))) for y in (x, decoded)]
    head = jax.tree.map(np.asarray, params["alignment"])
    aligned = distance(head_by_numpy(head, np.asarray(states)), features[0])
    apart = distance(features[1], features[0])
    assert aligned > 0.1 and apart > 0.01
    total, metrics = loss(jnp.int32(9))
    assert float(metrics["alignment"]) == pytest.approx(aligned, rel=1e-3)
    assert float(metrics["features"]) == pytest.approx(apart, rel=1e-3)
    assert float(total) == pytest.approx(0.5 * aligned + 0.3 * apart, rel=1e-3)
    assert float(metrics["pull_alignment"]) > 0 and float(metrics["pull_features"]) > 0
    assert float(loss(jnp.int32(0))[0]) == 0
    heldout = stage.evaluate(params, frozen, batch, KEY)
    hard = apply(stage.network, params["tokenizer"], x).clip(-1, 1)
    wanted = distance(np.asarray(patch_features(*vision, hard, (2, 2))), features[0])
    assert float(heldout["features"]) == pytest.approx(wanted, rel=1e-3)


def test_alignment_teaches_decoder_and_head_and_nothing_else(tiny_tokenizer_config, folder):
    none, alignment = dict(weight=0.0), dict(weight=0.5, start=0, warmup=0, block=0)
    config = config_of(tiny_tokenizer_config, folder, pixel=none, code=none, alignment=alignment)
    stage = make_stage(config)
    params, frozen = values(stage)
    batch = {"image": jnp.asarray(IMAGES)}
    grads = jax.jit(jax.grad(lambda p: stage.loss(p, frozen, batch, KEY, jnp.int32(0))[0]))(params)
    blocks = grads["tokenizer"]["decoder"]["trunk"]["blocks_0"]["mlp"]["up"]["kernel"]
    # What comes after the block that is aligned learns nothing.
    assert [bool(np.abs(g).max() > 0) for g in blocks] == [True, False, False]
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(grads["alignment"]))
    assert np.abs(grads["tokenizer"]["encoder"]["patch_embed"]["kernel"]).max() > 0


def test_what_is_off_is_not_there(tiny_tokenizer_config, tmp_path):
    config = config_of(tiny_tokenizer_config, tmp_path / "no such folder")
    config.loss.adversarial.update(kind="features")
    stage = make_stage(config)
    assert stage.vision is None and stage.network.tapped is None and stage.frozen() == {}
    assert set(stage.networks) == {"tokenizer"} and stage.critics == {}
    for name in ("alignment", "features"):
        lacking = config_of(tiny_tokenizer_config, "", **{name: dict(weight=1.0)})
        with pytest.raises(UserError, match=f"loss.{name} looks through a frozen network: give"):
            make_stage(lacking)


def test_more_heads_or_blocks_than_there_are_is_refused(tiny_tokenizer_config, folder):
    judge = dict(weight=0.5, kind="features", heads=4)
    with pytest.raises(UserError, match="heads is 4, and .* has 3 blocks"):
        make_stage(config_of(tiny_tokenizer_config, folder, adversarial=judge))
    alignment = dict(weight=0.5, block=3)
    with pytest.raises(UserError, match="loss.alignment.block is 3: expected 0 to 2"):
        make_stage(config_of(tiny_tokenizer_config, folder, alignment=alignment))


def test_heads_judge_their_own_block_by_their_own_formula():
    judge = FeatureDiscriminator(features=5, heads=2, width=4)
    params = jax.tree.map(
        lambda x: np.random.default_rng(x.size).normal(size=x.shape).astype(np.float32),
        sharding.values(init_params(judge, KEY)),
    )
    states = np.random.default_rng(6).normal(size=(2, 3, 2, 3, 5)).astype(np.float32) * 9

    def leaky(x):
        return np.where(x > 0, x, 0.2 * x)

    wanted = []
    for n in range(2):
        x = states[n]
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
        x = leaky(x @ params[f"in_{n}"]["kernel"][0, 0] + params[f"in_{n}"]["bias"])
        padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        y = params[f"around_{n}"]["bias"] + sum(
            padded[:, i : i + 2, j : j + 3] @ params[f"around_{n}"]["kernel"][i, j]
            for i in range(3)
            for j in range(3)
        )
        x = (x + leaky(y)) / np.sqrt(2)
        out = x @ params[f"out_{n}"]["kernel"][0, 0] + params[f"out_{n}"]["bias"]
        wanted.append(out[..., 0])
    found = apply(judge, params, jnp.asarray(states))
    np.testing.assert_allclose(found, np.stack(wanted), rtol=1e-4, atol=1e-4)
