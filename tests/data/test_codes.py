"""Codes: packing, encoding against the tokenizer itself, training from them."""

import io
import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from instella_jax.data import codes
from instella_jax.data.codes import CodeShards, PickVariant
from instella_jax.data.loader import make_loader
from instella_jax.data.scenes.source import EmojiScenes
from instella_jax.data.shards import ImageShards, Shard, shard_writer, write_dataset_file
from instella_jax.data.sources import make_split, part_names, part_paths
from instella_jax.data.watch import DataWatch
from instella_jax.errors import UserError
from instella_jax.models.functional import apply
from instella_jax.models.tokenizer import TokenizerNetwork
from instella_jax.preparing.encoding import Views, encode_dataset
from instella_jax.stages import make_stage
from instella_jax.weights import model_folder
from tests import tiny_diffusion
from tests.paths import ROOT


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A data set of 11 noisy pictures in 2 shards, number 4 no picture; and the pictures."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (11, 40, 48, 3), np.uint8)
    shards = []
    for number, rows in enumerate((range(0, 6), range(6, 11))):
        path = folder / f"{number}.arrayrecord"
        with shard_writer(path, path.with_suffix(".scratch")) as writer:
            for row in rows:
                file = io.BytesIO()
                Image.fromarray(images[row]).save(file, "png")
                header = {"key": f"k{row}", "texts": [f"{row} a", f"{row} b"], "size": [48, 40]}
                writer.write(header, b"broken" if row == 4 else file.getvalue())
        shards.append(Shard(path.name, len(rows), path.stat().st_size))
    write_dataset_file(folder, "images", shards, {})
    return folder, images


def centre(image, side):
    """The largest square from the centre of a 40 x 48 picture, by Pillow."""
    return np.asarray(
        Image.fromarray(image).resize((side, side), Image.Resampling.BICUBIC, (4, 0, 44, 40))
    )


def tokens(folder, images):
    """Bits [B, N, K] by the tokenizer itself, and how far its logits are from 0."""
    sizes = model_folder.tokenizer_config(model_folder.read_description(folder)["tokenizer"])
    network = TokenizerNetwork(sizes)
    params = model_folder.load(folder, "tokenizer", network, "float32")
    logits = jax.jit(lambda x: apply(network, params, x, method="encode"))(
        np.asarray(images, np.float32) / 127.5 - 1
    )
    return np.asarray(logits) > 0, np.abs(np.asarray(logits))


def test_bits_are_packed_with_the_first_on_top():
    code = np.zeros((2, 3, 5), np.float32)
    code[0, 0, 0] = code[0, 1, 4] = code[1, 2, 4] = 1
    packed = np.asarray(codes.pack_bits(code))
    assert packed.tolist() == [[0b10000000, 0b01000000], [0, 0b00000010]]
    assert codes.packed_bytes(3, 5) == 2 and codes.packed_bytes(128, 64) == 1024
    np.testing.assert_array_equal(codes.unpack_bits(packed, 3, 5), code)


def test_views_are_crops_and_their_mirror_images(pictures):
    image = pictures[1][0]
    views = Views(16, crops=3, flip=True, seed=1)
    cut = views.cut(image, 7)
    assert cut.shape == (6, 16, 16, 3) and views.count == 6
    np.testing.assert_array_equal(cut[0], centre(image, 16))
    np.testing.assert_array_equal(cut[1::2], cut[::2, :, ::-1])
    assert (cut[2] != cut[4]).any() and (cut[2] != cut[0]).any()
    np.testing.assert_array_equal(cut, views.cut(image, 7))
    assert (cut[2] != views.cut(image, 8)[2]).any()


def test_codes_are_those_of_the_tokenizer(pictures, tiny_tokenizer_folder, tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    source, images = pictures
    side = model_folder.read_description(tiny_tokenizer_folder)["image_size"]
    views = Views(side, crops=2, flip=True)
    report = encode_dataset(
        str(tiny_tokenizer_folder), source, tmp_path / "out", views=views, batch_size=12
    )
    assert (report["kept"], report["dropped"]) == (10, 1)
    assert "k4" in report["examples"][0] and "k4" in caplog.text
    encoded, original = CodeShards(tmp_path / "out"), ImageShards(source, captions=False)
    assert len(encoded) == len(original) == 11
    manifest = json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert manifest["variants"] == 4 and manifest["image_size"] == side
    assert report["bytes"] == 10 * 4 * codes.packed_bytes(manifest["num_tokens"], manifest["bits"])
    for row in (0, 5, 10):
        sample = encoded[row]
        assert sample["texts"] == (f"{row} a", f"{row} b")
        bits, sure = tokens(tiny_tokenizer_folder, views.cut(images[row], row))
        found = codes.unpack_bits(sample["code"], manifest["num_tokens"], manifest["bits"])
        agree = (np.asarray(found) > 0.5) == bits
        assert agree[sure > 1e-4].all() and agree.mean() > 0.99
    with pytest.raises(codes.BadSample, match="k4 .* has no code"):
        encoded[4]
    # The splits are those of the pictures.
    for split in ("train", "heldout"):
        ours = CodeShards(tmp_path / "out", split=split, heldout=0.5)
        theirs = ImageShards(source, split=split, heldout=0.5)
        keys = [[part.read(i)[0]["key"] for i in range(len(part))] for part in (ours, theirs)]
        assert keys[0] == keys[1]


def test_an_interrupted_encoding_goes_on(pictures, tiny_tokenizer_folder, tmp_path):
    arguments = (str(tiny_tokenizer_folder), pictures[0])

    class Enough(Exception):
        pass

    def stop(line):
        if (tmp_path / "cut" / "shards" / "00000.json").exists():
            raise Enough

    with pytest.raises(Enough):
        encode_dataset(*arguments, tmp_path / "cut", batch_size=8, show=stop)
    assert not (tmp_path / "cut" / "dataset.json").exists()
    with pytest.raises(UserError, match="begun with other"):
        encode_dataset(*arguments, tmp_path / "cut", views=Views(16, crops=2))
    assert encode_dataset(*arguments, tmp_path / "cut", batch_size=8) == encode_dataset(
        *arguments, tmp_path / "whole", batch_size=8
    )
    for number in range(2):
        name = f"shards/{number:05d}.arrayrecord"
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_cut_shards_are_told_once_and_nothing_but_them_is_no_data_set(
    pictures, tiny_tokenizer_folder, tmp_path, caplog
):
    caplog.set_level(logging.WARNING)
    source = shutil.copytree(pictures[0], tmp_path / "in")
    cut = source / "1.arrayrecord"
    cut.write_bytes(cut.read_bytes()[:-1])
    report = encode_dataset(str(tiny_tokenizer_folder), source, tmp_path / "out")
    assert (report["kept"], report["dropped"]) == (5, 6)
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 2 and "k4" in told[0] and "1.arrayrecord" in told[1]
    cut = source / "0.arrayrecord"
    cut.write_bytes(cut.read_bytes()[:-1])
    with pytest.raises(UserError, match="no picture of .* could be encoded"):
        encode_dataset(str(tiny_tokenizer_folder), source, tmp_path / "none")
    assert not (tmp_path / "none" / "dataset.json").exists()


@pytest.mark.slow
def test_a_killed_encoding_loses_and_repeats_nothing(tiny_tokenizer_folder, tmp_path):
    folder, image = tmp_path / "in", io.BytesIO()
    folder.mkdir()
    Image.effect_noise((512, 512), 60).convert("RGB").save(image, "png")
    shards = []
    for number in range(6):
        path = folder / f"{number}.arrayrecord"
        with shard_writer(path, path.with_suffix(".scratch")) as writer:
            for row in range(40):
                writer.write({"key": f"{number}-{row}", "texts": ["noise"]}, image.getvalue())
        shards.append(Shard(path.name, 40, path.stat().st_size))
    write_dataset_file(folder, "images", shards, {})
    out, arguments = tmp_path / "out", (str(tiny_tokenizer_folder), str(folder))
    command = [sys.executable, "-m", "instella_jax", "data", "encode", *arguments, str(out)]
    process = subprocess.Popen(
        [*command, "--crops=2", "--batch-size=8", "--distributed=off"], stdout=subprocess.DEVNULL
    )
    done = out / "shards" / "00002.json"
    while process.poll() is None and not done.exists():
        time.sleep(0.002)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert done.exists() and not (out / "dataset.json").exists()
    views = Views(model_folder.read_description(tiny_tokenizer_folder)["image_size"], crops=2)
    begun = done.stat().st_mtime_ns
    for path in (out, tmp_path / "whole"):
        encode_dataset(*arguments, path, views=views, batch_size=8)
    assert done.stat().st_mtime_ns == begun
    found, whole = (
        {path.name: path.read_bytes() for path in (folder / "shards").iterdir()}
        for folder in (out, tmp_path / "whole")
    )
    assert found == whole and len(CodeShards(out)) == 240


@pytest.mark.thorough
def test_two_processes_encode_what_one_does(pictures, tiny_tokenizer_folder, tmp_path):
    alone = encode_dataset(str(tiny_tokenizer_folder), pictures[0], tmp_path / "one")
    command = ["data", "encode", tiny_tokenizer_folder, pictures[0], tmp_path / "two"]
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    result = subprocess.run(
        ["bash", ROOT / "launch/processes.sh", "2", *command],
        env={**os.environ, "PYTHON": sys.executable, "PORT": str(port)},
        capture_output=True, text=True, check=False, timeout=400,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    # Both took part, and one of them tells the result.
    assert "process 0 of 2: 6/6 pictures" in result.stdout
    assert result.stdout.count(f"encoded {alone['kept']} pictures") == 1
    for name in ("shards/00000.arrayrecord", "shards/00001.arrayrecord", "dataset.json"):
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()
    # The folder is whole: a second time there is nothing to do.
    assert encode_dataset(str(tiny_tokenizer_folder), pictures[0], tmp_path / "two") == alone


def test_what_cannot_be_encoded_is_one_sentence(pictures, tiny_tokenizer_folder, tmp_path):
    with pytest.raises(UserError, match="no model at"):
        encode_dataset(str(tmp_path / "missing"), pictures[0], tmp_path / "out")
    with pytest.raises(UserError, match="is not a finished data set"):
        encode_dataset(str(tiny_tokenizer_folder), tmp_path, tmp_path / "out")
    with pytest.raises(UserError, match="crops must be"):
        Views(16, crops=0)


@pytest.fixture(scope="module")
def code_config(pictures, tiny_tokenizer_folder, tmp_path_factory):
    """Config of a tiny generator that trains on codes."""
    folder = tmp_path_factory.mktemp("codes") / "set"
    encode_dataset(str(tiny_tokenizer_folder), pictures[0], folder, batch_size=8)
    config = tiny_diffusion.get_config()
    config.tokenizer = str(tiny_tokenizer_folder)
    config.data.kind = "codes"
    config.data.codes.path = str(folder)
    return config


def test_the_loss_of_codes_is_that_of_their_pictures(code_config, pictures):
    stage = make_stage(code_config)
    loader = stage.loader("train", batch_size=4)
    batch = next(loader)
    loader.close()
    assert "image" not in batch and batch["code"].dtype == np.uint8
    assert stage.frozen() == {}
    source = ImageShards(pictures[0], captions=False)
    rows = [int(text.split()[0]) for text in batch["text"]]
    side = code_config.data.image_size
    images = np.stack([centre(source[row]["image"], side) for row in rows])
    with_pictures = code_config.copy_and_resolve_references()
    with_pictures.data.kind = "shards"
    other = make_stage(with_pictures)
    code = stage.code_of({}, {"code": jnp.asarray(batch["code"])})
    encoded = jax.jit(other.encode)(jax.tree.map(lambda x: getattr(x, "value", x), other.frozen(),
                                    is_leaf=lambda x: hasattr(x, "value")), images)  # fmt: skip
    assert np.mean(np.asarray(code) == np.asarray(encoded)) > 0.99


def test_codes_of_another_tokenizer_or_shape_are_refused(code_config, tmp_path):
    config = code_config.copy_and_resolve_references()
    config.data.image_size *= 2
    with pytest.raises(UserError, match=r"have image_size=\d+, the config \d+"):
        make_stage(config).loader("train", batch_size=2)
    with pytest.raises(UserError, match="not made by the tokenizer"):
        manifest = json.loads(
            (model_folder.Path(config.data.codes.path) / "dataset.json").read_text()
        )
        (tmp_path / "tokenizer.safetensors").write_bytes(b"other")
        codes.check_dataset(
            config.data.codes.path, manifest["num_tokens"], manifest["bits"],
            manifest["image_size"], tmp_path,
        )  # fmt: skip
    with pytest.raises(UserError, match="a tokenizer trains on pictures"):
        make_split(code_config.data, "train", captions=False, batch_size=1)


def test_training_begins_with_no_codes_of_another_tokenizer(
    code_config, tiny_tokenizer_folder, tmp_path
):
    other = tmp_path / "other"
    shutil.copytree(tiny_tokenizer_folder, other)
    weights = bytearray((other / "tokenizer.safetensors").read_bytes())
    weights[-1] ^= 1
    (other / "tokenizer.safetensors").write_bytes(weights)
    config = code_config.copy_and_resolve_references()
    config.tokenizer = str(other)
    for split in ("train", "heldout"):
        with pytest.raises(UserError, match="not made by the tokenizer"):
            make_stage(config).loader(split, batch_size=2)


def test_a_variant_is_sampled_in_training_and_the_first_taken_else():
    sample = {"code": np.arange(6, dtype=np.uint8).reshape(3, 2), "texts": ("a", "b")}
    rng = np.random.default_rng(0)
    drawn = [PickVariant(True)(dict(sample), rng) for _ in range(60)]
    assert {int(s["code"][0]) for s in drawn} == {0, 2, 4} and {s["text"] for s in drawn} == {*"ab"}
    first = PickVariant(False)(dict(sample), rng)
    assert first["code"].tolist() == [0, 1] and first["text"] == "a" and "texts" not in first


@pytest.mark.parametrize("kind", ["shards", "codes"])
def test_mixtures_by_config(code_config, pictures, kind):
    config = code_config.copy_and_resolve_references().data
    config.kind = kind
    path = str(pictures[0]) if kind == "shards" else config.codes.path
    config[kind].path, config[kind].weights = f"{path}, {path}", "3:1"
    assert part_paths(config) == [path, path]
    name = model_folder.Path(path).name
    assert part_names(config) == [f"{name}_0", f"{name}_1"]
    loader = make_split(config, "train", captions=True, batch_size=8)
    assert np.bincount(next(loader)["source"]).tolist() == [6, 2]
    loader.close()
    held = list(make_split(config, "heldout", captions=True, batch_size=1))
    assert held and all(batch["text"][0] == "0 a" for batch in held)
    for wrong in ("3", "3:0", "3:x", "1:2:3", "nan:1"):
        config[kind].weights = wrong
        with pytest.raises(UserError, match="for example 3:1"):
            make_split(config, "train", captions=True, batch_size=8)
    config[kind].path = " , "
    with pytest.raises(UserError, match=f"data.{kind}.path is empty"):
        make_split(config, "train", captions=True, batch_size=8)


def test_watch_tells_the_part_of_the_time_that_it_waited():
    now = [0.0]

    def batches():
        while True:
            now[0] += 1.0
            yield {}

    watch, loader = DataWatch(clock=lambda: now[0]), batches()
    for _ in range(2):
        watch.take(loader)
        now[0] += 3.0
    assert watch.waited() == 0.25
    watch.take(loader)
    assert watch.waited() == 1.0
    assert watch.waited() == 0.0


def test_a_batch_that_was_peeked_at_is_taken_next_or_put_back():
    loader = make_loader(EmojiScenes(16), batch_size=2, seed=0)
    batches = [next(loader)["image"] for _ in range(3)]
    loader = make_loader(EmojiScenes(16), batch_size=2, seed=0)
    watch = DataWatch()
    for _ in range(2):
        np.testing.assert_array_equal(watch.peek(loader)["image"], batches[0])
    watch.put_back(loader)
    for wanted in batches[:2]:
        np.testing.assert_array_equal(watch.peek(loader)["image"], wanted)
        np.testing.assert_array_equal(watch.take(loader)["image"], wanted)
    watch.put_back(loader)
    np.testing.assert_array_equal(watch.take(loader)["image"], batches[2])


def test_watch_weighs_shapes_by_their_pictures():
    values = {(4, 8): 1.0, (8, 4): 4.0, (8, 8): 16.0}
    watch = DataWatch(list(values))
    assert watch.mean(values) == 7.0  # nothing was taken yet
    images = [np.zeros((2, 3, *shape, 3), np.uint8) for shape in ((4, 8), (4, 8), (8, 4), (8, 4))]
    loader = iter([{"image": image} for image in images])
    for _ in range(3):
        watch.take(loader)
    assert watch.mean(values) == 2.0
    watch.take(loader)
    assert watch.mean(values) == 2.5
