"""Precomputed codes of training scenes: what they are of, and which stages train on them."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from configs import t2i_ar, t2i_diffusion
from instella_jax import BinaryTokenizer
from instella_jax.data import scene_codes
from instella_jax.data.sources import make_split, scenes_source
from instella_jax.errors import UserError
from instella_jax.planning.plan import batch_shapes
from instella_jax.runtime import sharding
from instella_jax.stages import make_stage
from instella_jax.stages.base import init_stage
from instella_jax.stages.parameters import load_frozen
from instella_jax.stages.precomputed_codes import (
    describe_scenes,
    find_scene_codes,
    trains_on_codes,
)
from instella_jax.training import flops
from instella_jax.weights.model_folder import ASSETS
from tools import encode_scenes

SHIPPED = scene_codes.DEMO_FOLDER


@pytest.fixture
def config():
    return t2i_diffusion.get_config()


def shipped():
    return load_file(SHIPPED / "codes.safetensors")["codes"]


def test_the_shipped_codes_are_those_of_the_shipped_tokenizer(config):
    packed = shipped()
    chosen = np.random.default_rng(0).choice(len(packed), 64, replace=False)
    source = scenes_source(config.data, "train")
    images = np.stack([source[int(i)]["image"] for i in chosen])
    wanted = np.asarray(BinaryTokenizer.from_pretrained("demo").encode(images))
    found = np.unpackbits(packed[chosen], axis=-1).reshape(wanted.shape)
    # Another machine may round a logit beside 0 to its other side.
    assert np.mean(found == wanted) > 0.999
    others = np.roll(wanted, 1, axis=0)
    assert np.mean(found == others) < 0.9


def test_scenes_have_their_own_codes_and_captions(config):
    scenes = scenes_source(config.data, "train")
    coded = scene_codes.CodedScenes(scenes, SHIPPED)
    packed = shipped()
    assert len(coded) == len(packed) == 30_000
    for index in (0, 1, 29_999):
        sample = coded[index]
        assert sample["text"] == scenes[index]["text"]
        np.testing.assert_array_equal(sample["code"], packed[index])


@pytest.mark.parametrize("module", [t2i_diffusion, t2i_ar])
def test_the_demos_train_on_them_and_evaluate_on_pictures(module):
    config = module.get_config()
    assert find_scene_codes(config) == SHIPPED and trains_on_codes(config)
    stage = make_stage(config)
    batch = next(stage.loader("train", batch_size=4, steps_per_call=2))
    assert batch["code"].shape == (2, 4, 64) and "image" not in batch
    wanted = batch_shapes(config, 4, (2,))
    assert {name: batch[name].shape for name in wanted} == {n: s.shape for n, s in wanted.items()}
    assert next(stage.loader("heldout", batch_size=4))["image"].shape == (4, 64, 64, 3)
    assert "image encoder" not in flops.training(config)
    config.data.scenes.codes = ""
    assert "image encoder" in flops.training(config) and not trains_on_codes(config)
    assert next(make_stage(config).loader("train", batch_size=4))["image"].ndim == 4


@pytest.mark.parametrize(
    ("key", "value"),
    [("seed", 1), ("scenes.places", "snapped"), ("scenes.max_objects", 2),
     ("scenes.concepts", ("cat", "dog", "car")), ("scenes.styles", ("fluent",))],
)  # fmt: skip
def test_of_other_scenes_none_are_taken_and_that_is_said(config, key, value, capsys):
    with config.ignore_type():
        config.data.update_from_flattened_dict({key: value})
    assert find_scene_codes(config) is None
    stage = make_stage(config)
    assert "image" in next(stage.loader("train", batch_size=2))
    assert "each step renders and encodes" in capsys.readouterr().out
    next(stage.loader("heldout", batch_size=2))
    assert not capsys.readouterr().out


def test_of_another_tokenizer_none_are_taken(config, tmp_path):
    shutil.copytree(ASSETS / "demo_tokenizer", tmp_path / "tokenizer")
    config.tokenizer = str(tmp_path / "tokenizer")
    assert find_scene_codes(config) == SHIPPED
    with (tmp_path / "tokenizer" / "tokenizer.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x01")
    assert find_scene_codes(config) is None


def test_a_folder_without_codes_is_named(config, tmp_path):
    config.data.scenes.codes = str(tmp_path)
    with pytest.raises(UserError, match=r"data.scenes.codes: cannot read .*codes.safetensors"):
        find_scene_codes(config)
    (tmp_path / "codes.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"data.scenes.codes: cannot read .*codes.safetensors"):
        find_scene_codes(config)


@pytest.mark.thorough
def test_the_loss_on_a_code_is_that_on_its_picture(config):
    stage = make_stage(config)
    source = scenes_source(config.data, "train")
    batch = next(stage.loader("train", batch_size=2))
    rows = {name: jnp.asarray(batch[name]) for name in ("ids", "mask")}
    images = jnp.stack([jnp.asarray(source[i]["image"]) for i in (5, 6)])
    frozen = load_frozen(stage, sharding.make_mesh({"data": 1}, jax.devices()[:1]))
    params = init_stage(stage, jax.random.key(0))
    key, step = jax.random.key(1), jnp.int32(0)
    one, _ = stage.loss(params, frozen, {**rows, "code": shipped()[5:7]}, key, step)
    other, _ = stage.loss(params, frozen, {**rows, "image": images}, key, step)
    np.testing.assert_allclose(one, other, rtol=1e-3)


@pytest.mark.thorough
def test_the_tool_makes_codes_that_a_config_of_the_same_scenes_finds(config, tmp_path):
    packed = encode_scenes.encode(config, 100)
    assert np.mean(np.unpackbits(packed) == np.unpackbits(shipped()[:100])) > 0.999
    scene_codes.write_codes(tmp_path / "codes", packed, describe_scenes(config))
    assert (tmp_path / "codes" / "codes.safetensors").stat().st_mode & 0o777 == 0o644
    config.data.scenes.codes = str(tmp_path / "codes")
    assert find_scene_codes(config) == tmp_path / "codes"
    loader = make_split(
        config.data, "train", captions=True, batch_size=100, scene_codes=tmp_path / "codes"
    )
    # One batch is one epoch, in another order.
    assert sorted(map(bytes, next(loader)["code"])) == sorted(map(bytes, packed))
