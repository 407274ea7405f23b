"""Held-out data of which nothing can be used."""

import pytest
from PIL import Image

from configs import tokenizer
from instella_jax.data.sources import make_split
from instella_jax.errors import UserError


@pytest.fixture
def config(tmp_path):
    """A folder of four pictures of which one is held out."""
    config = tokenizer.get_config().data
    config.update(kind="folder", image_size=32, workers=0)
    config.folder.update(path=str(tmp_path), heldout=0.25)
    for name in "abcd":
        Image.new("RGB", (40, 40), (ord(name), 0, 0)).save(tmp_path / f"{name}.png")
    return config


def read(config):
    loader = make_split(config, "heldout", captions=False, batch_size=4)
    try:
        return list(loader)
    finally:
        loader.close()


def test_the_only_held_out_picture_is_named_where_it_is_broken(config, tmp_path):
    (batch,) = read(config)
    (red,) = batch["image"][:, 0, 0, 0]
    path = tmp_path / f"{chr(red)}.png"
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(UserError, match=f"{path.name}.*all that is held out.*data.folder.heldout"):
        read(config)


def test_others_are_gone_on_with(config, tmp_path):
    config.folder.heldout = 0.5
    (batch,) = read(config)
    red = batch["image"][0, 0, 0, 0]
    path = tmp_path / f"{chr(red)}.png"
    path.write_bytes(path.read_bytes()[:60])
    (rest,) = read(config)
    assert rest["image"][:, 0, 0, 0].tolist() == batch["image"][1:, 0, 0, 0].tolist()
