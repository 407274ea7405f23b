"""Second stage and fine-tuning of a tokenizer from a model folder, by their variants."""

import jax
import numpy as np
import pytest
from PIL import Image

from instella_jax.reporting.metrics import read_metrics
from instella_jax.runtime import sharding
from instella_jax.stages import make_stage
from instella_jax.training import loop
from instella_jax.weights import model_folder
from tests import tiny_tokenizer

pytestmark = pytest.mark.slow


@pytest.fixture
def pictures(tmp_path):
    """Two dozen pictures of much the same colour, in three sizes."""
    (folder := tmp_path / "pictures").mkdir()
    rng = np.random.default_rng(0)
    for number in range(24):
        side = (40, 56, 72)[number % 3]
        colour = (np.array([220, 60, 40]) + rng.integers(-20, 20, 3)).astype(np.uint8)
        image = np.broadcast_to(colour, (side, side, 3))
        Image.fromarray(np.ascontiguousarray(image)).save(folder / f"{number:02}.png")
    return folder


@pytest.mark.thorough
@pytest.mark.parametrize("recipe", ["stage2", "finetune", "finetune_decoder"])
def test_a_recipe_goes_on_from_a_model(
    recipe, pictures, tiny_tokenizer_folder, tmp_path, monkeypatch
):
    make_mesh = sharding.make_mesh
    monkeypatch.setattr(sharding, "make_mesh", lambda sizes: make_mesh(sizes, jax.devices()[:1]))
    monkeypatch.setattr(loop, "print_overview", lambda params: None)
    config = tiny_tokenizer.get_config(f"photographs_128+{recipe}")
    config.init_from = str(tiny_tokenizer_folder)
    config.data.folder.path = str(pictures)
    config.data.workers = 0
    if recipe == "stage2":
        assert config.data.buckets == "128x128,192x192,256x256"
        config.data.buckets = "32x32,48x48,64x64"
        config.loss.adversarial.weight = 0.0
    config.loss.perceptual.weight = 0.0  # the weights of VGG are the user's
    config.train.update(steps=16, batch_size=4, accumulate=1, log_every=1)
    config.optimizer.learning_rate = 3e-3
    loop.train(config, tmp_path / "run")
    network = make_stage(config).network
    before, after = (
        model_folder.load(folder, "tokenizer", network, "float32")
        for folder in (tiny_tokenizer_folder, tmp_path / "run" / "model")
    )
    kept = jax.tree.map(lambda x: np.asarray(x, "bfloat16").astype(np.float32), before)
    changed = jax.tree.map(lambda a, b: not np.array_equal(a, b), kept, after)
    for part in ("encoder", "to_bits"):
        assert any(jax.tree.leaves(changed[part])) == (recipe == "finetune"), part
    assert any(jax.tree.leaves(changed["decoder"]))
    rows = [row for row in read_metrics(tmp_path / "run") if "train/loss" in row]
    losses = [row["train/pixel"] for row in rows]
    assert np.mean(losses[-4:]) < 0.7 * np.mean(losses[:4])
    if recipe == "stage2":
        samples = [f"train/samples_{side}x{side}" for side in (32, 48, 64)]
        assert all(sum(row[name] for row in rows) > 0 for name in samples)
