"""The tokenizer that users import: bits, sizes, tiles, and whose files it reads."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from instella_jax import BinaryTokenizer
from instella_jax.codec.format import BadCode, CodeFile
from instella_jax.codec.pictures import Decoding, Encoding
from instella_jax.data.codes import fingerprint
from instella_jax.errors import UserError
from instella_jax.models.functional import apply
from instella_jax.models.pixels import to_float, to_uint8
from instella_jax.runtime import sharding
from instella_jax.stages import make_stage
from tests import tiny_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer_folder):
    return BinaryTokenizer.from_pretrained(tiny_tokenizer_folder)


@pytest.fixture(scope="module")
def side(tokenizer):
    return tokenizer.shapes[0][0]


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (*shape, 3), np.uint8)


def test_bits_and_pictures_are_those_of_the_network(tokenizer, side):
    images = noise(5, side, side)
    network, params = tokenizer.network, tokenizer.params
    encode = jax.jit(lambda x: apply(network, params, x, method="encode"))
    logits = np.asarray(encode(to_float(jnp.asarray(images))))
    code = tokenizer.encode(images)
    assert code.dtype == np.uint8 and code.shape == (5, tokenizer.num_tokens, tokenizer.bits)
    sure = np.abs(logits) > 1e-4
    assert sure.mean() > 0.99
    np.testing.assert_array_equal(code[sure], (logits > 0)[sure])
    decode = jax.jit(lambda x: apply(network, params, x, side, side, method="decode"))
    decoded = decode(jnp.asarray(code, jnp.float32))
    difference = tokenizer.decode(code).astype(int) - np.asarray(to_uint8(decoded))
    assert np.abs(difference).max() <= 1


def test_a_folder_says_whether_codes_may_be_cut(tokenizer, tiny_tokenizer_folder, tmp_path):
    config = tiny_tokenizer.get_config()
    with pytest.raises(UserError, match="train one with loss.tail_drop"):
        tokenizer.check_tokens(1)
    folder = shutil.copytree(tiny_tokenizer_folder, tmp_path / "nested")
    config.loss.tail_drop = 0.5
    (folder / "config.json").write_text(json.dumps(make_stage(config).describe()))
    BinaryTokenizer.from_pretrained(folder).check_tokens(1)


def test_more_than_a_batch_and_one_alone(tokenizer, side):
    images = noise(19, side, side)
    codes = tokenizer.encode(images)
    assert len(codes) == 19
    # A logit near 0 may fall on either side in a batch of another size.
    assert np.mean(tokenizer.encode(images[17]) != codes[17]) < 0.02
    assert tokenizer.decode(codes[3]).shape == (side, side, 3)
    assert len(tokenizer.encode(images[:0])) == 0


def test_devices_of_a_mesh_share_a_batch(tokenizer, tiny_tokenizer_folder, side):
    mesh = sharding.make_mesh({"data": 4, "fsdp": 2, "tensor": 1})
    other = BinaryTokenizer.from_pretrained(tiny_tokenizer_folder, mesh=mesh)
    images = noise(5, side, side)
    begun = other.dispatch_encode(images)
    assert len(begun.sharding.device_set) == jax.device_count()
    assert np.mean(other.encode(images) != tokenizer.encode(images)) < 0.02


def test_bits_go_through_a_file_exactly(tokenizer, side):
    for seed, encoding in enumerate([Encoding(), Encoding(tile=20), Encoding(tile=20, overlap=5)]):
        image = noise(45, 61, seed=seed)
        file, parts = tokenizer.prepare(image, encoding)
        codes = tokenizer.encode(parts)
        data = tokenizer.to_bytes(image, encoding)
        read = CodeFile.from_bytes(data)
        assert read.tiles == (6 if encoding.tile else 1)
        np.testing.assert_array_equal(read.codes, codes)
        assert dataclasses.replace(read, codes=codes).to_bytes() == data
        # What is decoded depends on the bits alone.
        np.testing.assert_array_equal(tokenizer.from_bytes(data), tokenizer.from_bytes(data))
        assert tokenizer.from_bytes(data).shape == image.shape


def test_any_size_comes_back(tokenizer):
    for height, width in [(1, 1), (1, 300), (33, 64), (64, 33), (257, 129)]:
        data = tokenizer.to_bytes(noise(height, width))
        assert tokenizer.from_bytes(data).shape == (height, width, 3)
        assert tokenizer.from_bytes(data, Decoding(size=(40, 50))).shape == (40, 50, 3)
        longer = tokenizer.from_bytes(data, Decoding(size=96)).shape[:2]
        assert max(longer) == 96
        assert min(longer) == pytest.approx(96 * min(height, width) / max(height, width), abs=1)


def test_pictures_of_pillow(tokenizer):
    image = Image.fromarray(noise(30, 40))
    assert tokenizer.to_bytes(image) == tokenizer.to_bytes(np.asarray(image))
    assert tokenizer.fit(image).shape[:2] == tokenizer.shapes[0]


def test_files_of_other_weights_are_refused(tokenizer, side):
    data = tokenizer.to_bytes(noise(side, side))
    assert fingerprint_of(data) == tokenizer.fingerprint[:16]
    demo = BinaryTokenizer.from_pretrained("demo")
    with pytest.raises(BadCode, match=f"made by the model {tokenizer.fingerprint[:16]}"):
        demo.from_bytes(data)
    other = dataclasses.replace(
        CodeFile.from_bytes(data), bits=tokenizer.bits + 1, model=tokenizer.fingerprint[:16],
        codes=np.zeros((1, tokenizer.num_tokens, tokenizer.bits + 1), np.uint8),
    )  # fmt: skip
    with pytest.raises(BadCode, match="the model 4 of 8"):
        tokenizer.from_bytes(other.to_bytes())


def fingerprint_of(data):
    return data[5:13].hex()


def test_the_fingerprint_is_that_of_data_sets(tokenizer, tiny_tokenizer_folder):
    assert tokenizer.fingerprint == fingerprint(tiny_tokenizer_folder)


def test_what_cannot_be_encoded_is_said(tokenizer, side):
    for images in (noise(2, side, side).astype(np.float32), np.zeros((4, 4), np.uint8)):
        with pytest.raises(UserError, match="expected uint8"):
            tokenizer.encode(images)
    with pytest.raises(UserError, match="must be positive multiples"):
        tokenizer.encode(noise(1, side + 1, side))
    with pytest.raises(UserError, match="expected 0 and 1"):
        tokenizer.decode(np.full((1, tokenizer.num_tokens, tokenizer.bits), 2))
    with pytest.raises(UserError, match="expected 0 and 1"):
        tokenizer.decode(np.zeros((1, tokenizer.num_tokens + 1, tokenizer.bits)))
    nameless = BinaryTokenizer(tokenizer.network, tokenizer.params, shapes=())
    with pytest.raises(UserError, match="makes no files"):
        nameless.to_bytes(noise(side, side))
    with pytest.raises(UserError, match="does not say which picture size"):
        nameless.fit(noise(9, 9))
