"""Which config goes on with a workdir: sizes decide, and the bytes of models, not their place."""

import json
import shutil

import pytest

from instella_jax.errors import UserError
from instella_jax.training.workdir import USED, check_config, read_config, record_config
from instella_jax.weights import model_folder


@pytest.fixture
def config(tiny_diffusion_config):
    return tiny_diffusion_config


@pytest.fixture
def workdir(config, tmp_path):
    """A workdir as a run leaves it when it begins."""
    folder = tmp_path / "run"
    folder.mkdir()
    record_config(folder, config)
    return folder


@pytest.fixture
def copies(config, tmp_path):
    """Copies of the models that the config reads, and the config that names them."""
    for key, name in (("tokenizer", "tokenizer"), ("text.encoder", "text")):
        value = config.tokenizer if key == "tokenizer" else config.text.encoder
        shutil.copytree(model_folder.find(value, key), tmp_path / name)
    config.tokenizer, config.text.encoder = str(tmp_path / "tokenizer"), str(tmp_path / "text")
    return tmp_path


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("optimizer.learning_rate", 0.5),
        ("optimizer.schedule", "cosine"),
        ("train.steps", 100),
        ("train.batch_size", 16),
        ("train.log_every", 2),
        ("data.folder.path", "/elsewhere"),
        ("mesh.data", 2),
    ],
)
def test_what_may_change(config, workdir, key, value):
    config.update_from_flattened_dict({key: value})
    check_config(workdir, config)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model.num_layers", 3),
        ("model.bits", 16),
        ("text.model.hidden_size", 32),
        ("text.max_length", 20),
        ("text.trainable", False),
        ("data.image_size", 64),
        ("data.kind", "folder"),
        ("data.seed", 1),
        ("loss.target", "x"),
        ("optimizer.kind", "muon"),
        ("seed", 1),
        ("stage", "ar"),
    ],
)
def test_what_may_not(config, workdir, key, value):
    config.update_from_flattened_dict({key: value})
    with pytest.raises(UserError, match=f"belongs to a run with {key}=.*this one has {value!r}"):
        check_config(workdir, config)


@pytest.mark.parametrize(
    ("key", "value", "fits"),
    [("loss.caption_dropout", 0.5, True), ("data.seed", 1, True), ("loss.target", "x", False)],
)
def test_what_may_be_other_where_weights_are_only_used(config, workdir, key, value, fits):
    config.update_from_flattened_dict({key: value})
    if fits:
        check_config(workdir, config, USED)
        return
    with pytest.raises(UserError, match=f"belongs to a run with {key}="):
        check_config(workdir, config, USED)


def test_the_same_models_elsewhere_are_the_same(config, workdir, copies):
    check_config(workdir, config)


@pytest.mark.parametrize(
    ("file", "key"),
    [("tokenizer/tokenizer.safetensors", "tokenizer"), ("text/tokenizer.json", "text.encoder")],
)
def test_another_model_is_refused_wherever_it_is(config, workdir, copies, file, key):
    path = copies / file
    data = bytearray(path.read_bytes())
    data[-20] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=f"a run with another config.{key}: .* has other bytes"):
        check_config(workdir, config)
    # Also where the path is the old one.
    record_config(workdir, config)
    data[-20] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match="has other bytes"):
        check_config(workdir, config)
    path.unlink()
    with pytest.raises(UserError, match="is missing in"):
        check_config(workdir, config)


def test_the_weights_of_a_frozen_text_encoder_count(config, workdir, tmp_path):
    weights = tmp_path / "text"
    weights.mkdir()
    (weights / "tokenizer.json").write_text("{}")
    (weights / "text.safetensors").write_bytes(b"weights")
    config.text.update(encoder=str(weights), trainable=False)
    record_config(workdir, config)
    check_config(workdir, config)
    (weights / "text.safetensors").write_bytes(b"others")
    with pytest.raises(UserError, match="another config.text.encoder: text.safetensors has other"):
        check_config(workdir, config)


def test_a_model_that_is_no_longer_named_is_a_change(config, workdir):
    config.tokenizer = ""
    with pytest.raises(UserError, match="belongs to a run with tokenizer='/.*this one has ''"):
        check_config(workdir, config)


def test_the_config_of_a_run_comes_back_as_it_was(config, workdir):
    assert isinstance(config.data.scenes.styles, tuple)
    assert read_config(workdir).to_dict() == config.to_dict()


def test_a_run_from_before_there_were_digests_goes_by_the_path(config, workdir, copies):
    (workdir / "models.json").unlink()
    with pytest.raises(UserError, match="belongs to a run with .*this one has"):
        check_config(workdir, config)


def test_a_key_that_is_newer_than_the_run_is_no_change(config, workdir):
    path = workdir / "config.json"
    old = json.loads(path.read_text())
    del old["loss"]["times"]
    path.write_text(json.dumps(old))
    check_config(workdir, config)
    path.write_text("[]")
    with pytest.raises(UserError, match="is not valid JSON"):
        check_config(workdir, config)
