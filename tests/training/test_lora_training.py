"""Adapters by the one loop: on a model folder that stays as it is, from a folder of pictures."""

import json
import shutil

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from PIL import Image
from safetensors.numpy import load_file

from instella_jax.data.sources import make_split
from instella_jax.errors import UserError
from instella_jax.reporting.metrics import read_metrics
from instella_jax.runtime import sharding
from instella_jax.sampling.load import load_sampler
from instella_jax.sampling.options import options_from_config
from instella_jax.stages import make_stage
from instella_jax.stages.base import init_stage
from instella_jax.stages.parameters import load_frozen
from instella_jax.training import loop
from instella_jax.training.setup import state_shapes
from instella_jax.weights import lora_files, model_folder

pytestmark = pytest.mark.slow


def write_pictures(folder, caption, count=12):
    """A folder of random pictures with a caption."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    for index in range(count):
        pixels = rng.integers(0, 256, (32, 32, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text(caption, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Model folders of tiny generators with random weights, by kind; made when asked for."""
    root = tmp_path_factory.mktemp("bases")

    def folder(config):
        base = root / config.stage
        if not base.exists():
            stage = make_stage(config)
            params = sharding.values(jax.jit(lambda key: init_stage(stage, key))(jax.random.key(1)))
            model_folder.save(base, stage.describe(), params, text_folder=stage.text_folder)
        return base

    return folder


@pytest.fixture(params=["diffusion"])
def config(request, bases, tiny_diffusion_config, tiny_ar_config, tmp_path):
    """Adapters on a tiny generator with random weights, eight steps on a folder of pictures."""
    config = {"diffusion": tiny_diffusion_config, "ar": tiny_ar_config}[request.param]
    base = shutil.copytree(bases(config), tmp_path / "base")
    config.init_from = config.text.encoder = str(base)
    config.text.trainable = False
    config.mesh.update(data=1, fsdp=1, tensor=1)
    config.lora.update(rank=2, alpha=4.0)
    config.data.kind = "folder"
    new, old = (write_pictures(tmp_path / name, "a cat") for name in ("new", "old"))
    config.data.folder.update(path=f"{new},{old}", weights="3:1", heldout=0.1, min_keep=1.0)
    config.data.workers = 0
    config.optimizer.learning_rate = 0.05
    config.eval.batch_size = 2
    return config


@pytest.fixture
def first_devices(monkeypatch):
    """A run takes as many of the eight devices as its mesh asks for."""
    make_mesh = sharding.make_mesh

    def mesh_of(sizes, devices=None):
        count = int(np.prod([sizes[axis] for axis in sharding.AXES]))
        return make_mesh(sizes, devices or jax.devices()[:count])

    monkeypatch.setattr(sharding, "make_mesh", mesh_of)


def losses(workdir):
    return {r["step"]: r["train/loss"] for r in read_metrics(workdir) if "train/loss" in r}


@pytest.mark.parametrize(
    "config", ["diffusion", pytest.param("ar", marks=pytest.mark.thorough)], indirect=True
)
def test_a_run_leaves_adapters_that_going_on_does_not_change(config, first_devices, tmp_path):
    base = (tmp_path / "base" / "generator.safetensors").read_bytes()
    loop.train(config, tmp_path / "whole")
    assert (tmp_path / "base" / "generator.safetensors").read_bytes() == base
    assert not (tmp_path / "whole" / "model").exists()
    folder = tmp_path / "whole" / "lora"
    said = json.loads((folder / "adapter_config.json").read_text())
    assert said["base_model_name_or_path"] == config.init_from and said["r"] == 2
    assert lora_files.saved_step(folder) == 8
    tensors = load_file(folder / "adapter_model.safetensors")
    assert all(np.abs(np.float32(value)).max() > 0 for value in tensors.values())
    loop.train(config, tmp_path / "whole")  # which has ended
    # Gone on with from half-way: the checkpoint holds all that is trained.
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    for made in ("checkpoints/8", "lora"):
        shutil.rmtree(tmp_path / "parts" / made)
    loop.train(config, tmp_path / "parts")
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    parts = load_file(tmp_path / "parts" / "lora" / "adapter_model.safetensors")
    assert parts.keys() == tensors.keys()
    for name, value in tensors.items():
        np.testing.assert_array_equal(parts[name], value)
    # Sampled with by the run's folder, they make other pictures than the base alone.
    options = options_from_config(config.sample)
    adapted, _ = load_sampler(config, tmp_path / "whole")
    plain, _ = load_sampler(config, None)
    assert (adapted("a cat", options) != plain("a cat", options)).any()
    # Another base is another run.
    (tmp_path / "base" / "generator.safetensors").write_bytes(base[:-4] + bytes(4))
    with pytest.raises(UserError, match="another config.init_from: generator.safetensors has oth"):
        loop.train(config, tmp_path / "whole")


@pytest.mark.parametrize("config", ["diffusion", "ar"], indirect=True)
def test_the_state_is_of_the_adapters_alone(config):
    config.optimizer.kind = "muon"
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    state = state_shapes(make_stage(config), config, mesh)
    trained = jax.tree.leaves(state.params)
    assert all(2 in x.shape[-2:] for x in trained)
    moments = [x for x in jax.tree.leaves(state.opt_state) if x.ndim]
    assert len(moments) == 2 * len(trained)  # all of them Adam's
    query = state.params["lora"]["blocks"]["attention"]["q"]
    assert query["lora_a"].sharding.spec == P(None, "fsdp", None)
    assert query["lora_b"].sharding.spec == P(None, None, "tensor")


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("config", "kind"), [("diffusion", "adamw"), ("ar", "muon")], indirect=["config"]
)
def test_a_mesh_trains_as_one_device_does(config, kind, first_devices, tmp_path):
    config.optimizer.kind = kind
    config.train.update(steps=3, save_every=0)
    found = []
    for number, sizes in enumerate(
        ({}, dict(data=2) if kind == "muon" else dict(fsdp=2, tensor=2))
    ):
        config.mesh.update(sizes)
        loop.train(config, tmp_path / str(number))
        found.append(list(losses(tmp_path / str(number)).values()))
    assert len(found[0]) == 3
    np.testing.assert_allclose(found[0], found[1], rtol=1e-4)


def test_what_cannot_be_trained_is_one_sentence(config):
    config.text.trainable = True
    with pytest.raises(UserError, match="lora.rank trains adapters of the generator alone"):
        make_stage(config)
    config.text.trainable = False
    config.init_from = config.shipped = ""
    with pytest.raises(UserError, match="no weights to use"):
        make_stage(config).frozen()


@pytest.mark.parametrize("config", ["diffusion"], indirect=True)
def test_the_base_is_of_the_configs_target(config, tmp_path):
    config.loss.target = "x"
    with pytest.raises(UserError, match="predicts 'epsilon', config.loss.target is 'x': give"):
        load_frozen(make_stage(config), sharding.make_mesh({"data": 8, "fsdp": 1, "tensor": 1}))


@pytest.mark.parametrize("config", ["ar"], indirect=True)
def test_folders_are_mixed_by_weights(config, tmp_path):
    for number, name in enumerate(("new", "old")):
        for path in (tmp_path / name).glob("*.txt"):
            path.write_text(f"of {number}")
    loader = make_split(config.data, "train", captions=True, batch_size=8)
    texts = [text for _ in range(10) for text in next(loader)["text"]]
    assert texts.count("of 0") == 60 and texts.count("of 1") == 20
    commas = write_pictures(tmp_path / "a,b", "of commas")
    config.data.folder.update(path=str(commas), weights="")
    loader = make_split(config.data, "train", captions=True, batch_size=8)
    assert set(next(loader)["text"]) == {"of commas"}
    config.data.folder.path = ""
    with pytest.raises(UserError, match="data.folder.path is empty"):
        make_split(config.data, "train", captions=True, batch_size=8)
