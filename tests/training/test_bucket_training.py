"""Training of the tokenizer in buckets, and of its decoder alone."""

import jax
import numpy as np
import pytest
from PIL import Image

from instella_jax.errors import UserError
from instella_jax.planning import plan
from instella_jax.reporting.metrics import read_metrics
from instella_jax.runtime import sharding
from instella_jax.stages import make_stage
from instella_jax.training import flops, loop
from instella_jax.weights import model_folder

BUCKETS = "32x32,32x64,64x32"


@pytest.fixture
def config(tiny_tokenizer_config, tmp_path):
    """A tiny tokenizer on 39 noisy pictures for three buckets; one is broken."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(39):
        size = ((40, 40), (40, 80), (80, 40))[number % 3]
        image = Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8))
        image.resize(size[::-1], Image.Resampling.BICUBIC).save(folder / f"{number:02}.png")
    broken = folder / "04.png"
    broken.write_bytes(broken.read_bytes()[:500])
    config = tiny_tokenizer_config
    config.data.update(kind="folder", buckets=BUCKETS, workers=0)
    config.data.folder.update(path=str(folder), heldout=0.1)
    config.eval.update(batch_size=4)
    return config


@pytest.fixture(autouse=True)
def on_one_device(monkeypatch):
    make_mesh = sharding.make_mesh
    monkeypatch.setattr(sharding, "make_mesh", lambda sizes: make_mesh(sizes, jax.devices()[:1]))
    monkeypatch.setattr(loop, "print_overview", lambda params: None)


def lines(workdir):
    """Metrics of the steps of a run that are no matter of the clock."""
    rows = [row for row in read_metrics(workdir) if "train/loss" in row]
    clock = ("second", "flops", "data_wait")
    return [{k: v for k, v in row.items() if not any(c in k for c in clock)} for row in rows]


@pytest.mark.thorough
def test_a_run_in_buckets_goes_on_as_if_nothing_had_happened(config, tmp_path, capsys):
    result = loop.train(config, tmp_path / "whole")
    assert "bucket 32x64: " in capsys.readouterr().out
    config.train.steps = 4
    loop.train(config, tmp_path / "halves")
    config.train.steps = 8
    assert loop.train(config, tmp_path / "halves") == result
    assert lines(tmp_path / "halves") == lines(tmp_path / "whole")
    rows = [row for row in read_metrics(tmp_path / "whole") if "train/loss" in row]
    names = {f"train/samples_{shape}" for shape in BUCKETS.split(",")}
    assert all(names <= row.keys() for row in rows)
    assert sum(row[name] for row in rows for name in names) == 8 * 8
    shapes = {(32, 32), (32, 64), (64, 32)}
    least, most = (f(sum(flops.training(config, s).values()) for s in shapes) for f in (min, max))
    speeds = [
        1e12 * row["train/model_tflops_per_device"] / row["train/images_per_second"]
        for row in rows
        if "train/images_per_second" in row
    ]
    assert speeds and all(0.999 * least <= speed <= 1.001 * most for speed in speeds)


@pytest.mark.slow
def test_only_the_decoder_changes_with_a_frozen_encoder(config, tiny_tokenizer_folder, tmp_path):
    config.update(init_from=str(tiny_tokenizer_folder))
    config.loss.freeze_encoder = True
    config.train.update(ema_decay=0.7)
    loop.train(config, tmp_path / "run")
    network = make_stage(config).networks["tokenizer"]
    before, after = (
        model_folder.load(folder, "tokenizer", network, "float32")
        for folder in (tiny_tokenizer_folder, tmp_path / "run" / "model")
    )
    # The weights that training begins with, in the type that the model folder is written in.
    kept = jax.tree.map(lambda x: np.asarray(x, "bfloat16").astype(np.float32), before)
    for part in ("encoder", "to_bits"):
        jax.tree.map(np.testing.assert_array_equal, kept[part], after[part])
    for part in ("decoder", "embed"):
        changed = jax.tree.map(lambda a, b: not np.array_equal(a, b), kept[part], after[part])
        assert any(jax.tree.leaves(changed))
    rows = lines(tmp_path / "run")
    assert len(rows) == 8 and all(np.isfinite(row["train/loss"]) for row in rows)


def test_a_frozen_encoder_counts_once(config):
    whole = flops.training(config, (32, 64))["tokenizer"]
    config.loss.freeze_encoder = True
    sizes = model_folder.tokenizer_config(config.model)
    encoder = flops.encoder_forward(sizes, 32, 64)
    assert flops.training(config, (32, 64))["tokenizer"] == whole - 2 * encoder


def test_frozen_encoders_that_cannot_be(config):
    config.loss.freeze_encoder = True
    with pytest.raises(UserError, match="--config.init_from=FOLDER"):
        make_stage(config)
    config.init_from = "somewhere"
    config.optimizer.weight_decay = 0.1
    with pytest.raises(UserError, match="weight_decay is 0.1.*set it to 0"):
        make_stage(config)


def test_buckets_that_do_not_fit_the_tokenizer(config):
    config.data.buckets = "32x32,32x40"
    with pytest.raises(UserError, match="32x40 does not fit.*multiples of 16"):
        make_stage(config)


def test_plans_are_for_the_largest_bucket(config):
    config.data.buckets = "32x32,64x48,48x64,16x16"
    assert plan.batch_shapes(config, 4)["image"].shape == (4, 64, 48, 3)
    assert flops.training(config) == flops.training(config, (64, 48))
