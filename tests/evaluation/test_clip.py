import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from instella_jax.errors import UserError
from instella_jax.evaluation import clip
from instella_jax.evaluation.picture_sets import PictureSet
from tests.needs_torch import needs_torch

SIZES = {
    "vision_config": dict(
        hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=3,
        image_size=32, patch_size=8,
    ),
    "text_config": dict(
        hidden_size=16, intermediate_size=36, num_hidden_layers=3, num_attention_heads=2,
        max_position_embeddings=12,
    ),
    "projection_dim": 20,
}  # fmt: skip


def tokenizer_files(folder):
    """A tokenizer of few words, as transformers' CLIPTokenizer reads it."""
    letters = [chr(n) for n in range(ord("a"), ord("z") + 1)]
    names = [*letters, *(f"{x}</w>" for x in letters), "cat</w>", "dog</w>", "ca", "do"]
    names += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {name: number for number, name in enumerate(names)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\nc a\nca t</w>\nd o\ndo g</w>\n")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "CLIPTokenizer"}')
    return len(names)


def torch_model(folder, act="quick_gelu", old=False):
    """Random weights of transformers' CLIPModel, saved with its config and a tokenizer."""
    import torch
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(0)
    count = tokenizer_files(folder)
    text = {**SIZES["text_config"], "vocab_size": count, "hidden_act": act}
    text |= {"eos_token_id": 2 if old else count - 1, "bos_token_id": count - 2}
    vision = {**SIZES["vision_config"], "hidden_act": act}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=20)
    model = CLIPModel(config).eval()
    with torch.no_grad():
        for value in model.parameters():
            value.copy_(torch.randn_like(value) * 0.2)
    model.save_pretrained(folder)
    return model


@needs_torch
@pytest.mark.parametrize(("act", "old"), [("quick_gelu", True), ("gelu", False)])
def test_embeddings_are_those_of_transformers(tmp_path, act, old):
    import torch

    model = torch_model(tmp_path, act, old)
    ours = clip.load_clip(tmp_path)
    rng = np.random.default_rng(0)
    images = rng.normal(size=(3, 32, 32, 3)).astype(np.float32)
    ids = ours.tokenise(["a cat", "a dog and a cat", "dog"])
    with torch.no_grad():
        found = model(
            input_ids=torch.from_numpy(ids.astype(np.int64)),
            pixel_values=torch.from_numpy(images.transpose(0, 3, 1, 2)),
        )
    for theirs, mine in (
        (found.image_embeds, ours.embed_images(images)),
        (found.text_embeds, ours.embed_texts(ids)),
    ):
        np.testing.assert_allclose(np.asarray(mine), theirs.numpy(), atol=2e-5)


def random_clip(folder):
    """A model with random weights, its tokenizer of few words."""
    from transformers import CLIPTokenizer

    count = tokenizer_files(folder)
    tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    text = {**SIZES["text_config"], "eos_token_id": count - 1}
    config = clip.read_config({**SIZES, "text_config": text})
    towers = {
        "vision": (clip.ImageTower(config), jnp.zeros((1, 32, 32, 3))),
        "text": (clip.TextTower(config, count), jnp.zeros((1, 12), jnp.int32)),
    }
    rng = np.random.default_rng(3)
    params = {
        name: jax.tree.map(
            lambda x: rng.normal(size=x.shape).astype(np.float32) * 0.3,
            jax.eval_shape(tower.init, jax.random.key(0), example)["params"],
        )
        for name, (tower, example) in towers.items()
    }
    return clip.Clip(config, params, tokenizer)


def test_pictures_are_shared_among_devices_and_processes(tmp_path, monkeypatch):
    ours, rng = random_clip(tmp_path), np.random.default_rng(4)
    images = [rng.integers(0, 256, (40, 33 + n, 3), np.uint8) for n in range(21)]
    texts = [("a cat", "a dog and a cat", "dog")[n % 3] for n in range(21)]
    pictures = PictureSet(range(21), images.__getitem__)
    prepared = np.stack([ours.prepare(image) for image in images])
    wanted = (ours.embed_images(prepared) * ours.embed_texts(ours.tokenise(texts))).sum(-1)
    assert np.std(wanted) > 0.01
    done = []
    found = clip.clip_scores(
        ours, pictures, texts, batch_size=6, show=lambda *now: done.append(now)
    )
    assert done == [(8, 21), (16, 21), (21, 21)]  # eight devices
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    # Two processes, one after the other.
    parts = []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    for number in range(2):
        monkeypatch.setattr(jax, "process_index", lambda number=number: number)
        with monkeypatch.context() as patch:
            patch.setattr(clip, "of_all", lambda own: parts.append(own) or [])
            clip.clip_scores(ours, pictures, texts, batch_size=8)
    monkeypatch.setattr(clip, "of_all", lambda own: parts)
    found = clip.clip_scores(ours, pictures, texts, batch_size=8)
    assert [len(part) for part in parts] == [11, 10]
    np.testing.assert_allclose(found, wanted, atol=1e-5)


@needs_torch
def test_pictures_are_prepared_as_transformers_does(tmp_path):
    from transformers import CLIPImageProcessorPil

    torch_model(tmp_path)
    ours = clip.load_clip(tmp_path)
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    processor = CLIPImageProcessorPil(**size)
    image = np.random.default_rng(0).integers(0, 256, (50, 71, 3), np.uint8)
    expected = processor(Image.fromarray(image), return_tensors="np")["pixel_values"][0]
    np.testing.assert_allclose(ours.prepare(image), expected.transpose(1, 2, 0), atol=1e-5)


@needs_torch
def test_other_weights_are_refused(tmp_path):
    torch_model(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["vision_config"]["num_hidden_layers"] = 3
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="do not fit its config.json"):
        clip.load_clip(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"x")
    with pytest.raises(UserError, match="damaged"):
        clip.load_clip(tmp_path)


def test_texts_end_where_they_end(tmp_path):
    from transformers import CLIPTokenizer

    count = tokenizer_files(tmp_path)
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path, local_files_only=True)
    config = clip.read_config({**SIZES, "text_config": {**SIZES["text_config"]}})
    ids = clip.Clip(config, {}, tokenizer).tokenise(["a cat", "dog " * 30])
    assert ids.shape == (2, 12) and ids.dtype == np.int32
    assert ids[0, 0] == count - 2 and ids[0, 3] == count - 1
    assert ids[1, -1] == count - 1  # cut, and ended all the same
