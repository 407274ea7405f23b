"""Held-out data: in order, once, as they are; and the digests by which a resumed run goes on."""

import hashlib
import io
import itertools
import json

import numpy as np
import pytest
from PIL import Image

import configs.t2i_diffusion
import configs.tokenizer
from instella_jax.data import codes
from instella_jax.data.folder import FolderSource
from instella_jax.data.loader import Mixture, make_loader
from instella_jax.data.scenes.source import EmojiScenes, heldout_prompts
from instella_jax.data.shards import Shard, shard_writer, write_dataset_file
from instella_jax.data.sources import make_split

COUNT, SIDE = 24, 32
NAMES = [f"picture {number:02}.png" for number in range(COUNT)]


def picture(number):
    """A picture of 40 x 56 whose pixels say which one it is, and which is not its mirror image."""
    image = np.zeros((40, 56, 3), np.uint8)
    image[..., 0] = np.linspace(0, 250, 56)
    image[..., 1] = np.linspace(0, 250, 40)[:, None]
    image[..., 2] = 10 * number
    return image


def centre(number):
    """The largest square from the middle, by Pillow."""
    image = Image.fromarray(picture(number))
    return np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BICUBIC, (8, 0, 48, 40)))


def texts(number):
    return [f"{number} first", f"{number} second"]


def make_folder(path):
    path.mkdir()
    with (path / "metadata.jsonl").open("w") as lines:
        for number, name in enumerate(NAMES):
            Image.fromarray(picture(number)).save(path / name)
            lines.write(json.dumps({"file_name": name, "text": texts(number)}) + "\n")


def make_records(path, kind):
    path.mkdir()
    shard = path / "0.arrayrecord"
    with shard_writer(shard, path / "scratch") as writer:
        for number in range(COUNT):
            file = io.BytesIO()
            Image.fromarray(picture(number)).save(file, "png")
            payload = file.getvalue()
            if kind == "codes":  # three variants of four bytes
                payload = bytes([number, 0, 0, 1, number, 0, 0, 2, number, 0, 0, 3])
            writer.write({"key": str(number), "texts": texts(number), "size": [56, 40]}, payload)
    shards = [Shard(shard.name, COUNT, shard.stat().st_size)]
    more = dict(num_tokens=4, bits=8, image_size=SIDE, tokenizer="") if kind == "codes" else {}
    write_dataset_file(path, "images" if kind == "shards" else "codes", shards, more)


@pytest.fixture
def data(tmp_path):
    """The `data` section of a config for a kind of data."""

    def make(kind, heldout=0.25):
        config = configs.t2i_diffusion.get_config().data
        config.update(kind=kind, image_size=SIDE)
        if kind != "scenes":
            path = tmp_path / kind
            if not path.exists():
                make_folder(path) if kind == "folder" else make_records(path, kind)
            config[kind].update(path=str(path), heldout=heldout)
        return config

    return make


def number_of(row):
    return int(row.split()[0])


@pytest.mark.parametrize("kind", ["folder", "shards", "codes"])
def test_held_out_samples_come_once_in_order_and_as_they_are(data, kind):
    config = data(kind)
    if kind != "codes":
        config[kind].update(flip=1.0, min_keep=0.3)
    # No more than there are, should they not end.
    batches = list(itertools.islice(make_split(config, "heldout", captions=True, batch_size=4), 99))
    shown = [text for batch in batches for text in batch["text"]]
    numbers = [number_of(text) for text in shown]
    assert numbers == sorted(set(numbers)) and len(numbers) == COUNT // 4
    assert shown == [f"{number} first" for number in numbers]
    for index, number in enumerate(numbers):
        batch, row = batches[index // 4], index % 4
        if kind == "codes":
            assert batch["code"][row].tolist() == [number, 0, 0, 1]
        else:
            np.testing.assert_array_equal(batch["image"][row], centre(number))
    again = list(make_split(config, "heldout", captions=True, batch_size=4))
    assert [text for batch in again for text in batch["text"]] == shown


@pytest.mark.parametrize("kind", ["folder", "shards", "codes"])
def test_training_samples_are_the_others_shuffled_cropped_and_mirrored(data, kind):
    config = data(kind)
    if kind != "codes":
        config[kind].update(flip=0.5, min_keep=0.6)
    kept = {number_of(text)
            for batch in make_split(config, "heldout", captions=True, batch_size=4)
            for text in batch["text"]}  # fmt: skip
    loader = make_split(config, "train", captions=True, batch_size=18)
    epochs = [next(loader) for _ in range(4)]
    loader.close()
    orders = [[number_of(text) for text in batch["text"]] for batch in epochs]
    assert all(sorted(order) == sorted(set(range(COUNT)) - kept) for order in orders)
    assert len({tuple(order) for order in orders}) == 4
    assert {text.split()[1] for batch in epochs for text in batch["text"]} == {"first", "second"}
    if kind == "codes":
        assert {int(code[3]) for batch in epochs for code in batch["code"]} == {1, 2, 3}
        return
    mirrored = [image[0, 0, 0] > image[0, -1, 0] for batch in epochs for image in batch["image"]]
    assert 15 < sum(mirrored) < 57  # of 72
    cropped = [
        (image != centre(number)).any()
        for order, batch in zip(orders, epochs, strict=True)
        for number, image in zip(order, batch["image"], strict=True)
    ]
    assert np.mean(cropped) > 0.9


@pytest.mark.parametrize("kind", ["folder", "shards"])
@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_pictures_are_mirrored_as_often_as_the_config_says(data, kind, flip):
    config = data(kind)
    config[kind].update(flip=flip)
    loader = make_split(config, "train", captions=True, batch_size=18)
    images = next(loader)["image"]
    loader.close()
    assert [image[0, 0, 0] > image[0, -1, 0] for image in images] == [bool(flip)] * 18


def test_held_out_scenes_are_those_of_their_split_in_order(data):
    config = data("scenes")
    batch = next(make_split(config, "heldout", captions=True, batch_size=5))
    source = EmojiScenes(SIDE, config.seed, "heldout", places=config.scenes.places,
                         max_objects=config.scenes.max_objects)  # fmt: skip
    assert batch["text"] == [source.caption(index) for index in range(5)]
    for index in range(5):
        np.testing.assert_array_equal(batch["image"][index], source[index]["image"])


def digest(values):
    return hashlib.sha256(repr(values).encode()).hexdigest()[:16]


class Numbers:
    """Sample i is i."""

    def __init__(self, length):
        self.length = length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        return {"number": np.int64(index)}


def with_draw(sample, rng):
    return {**sample, "draw": np.int64(rng.integers(1 << 40))}


# Recorded. A run that goes on after an upgrade must find its data as they were: where one of these
# is meant to change, say so in the changelog.
SCENES = {
    ("train", "thirds"): "ca7de43dad9af4a5",
    ("train", "snapped"): "e1c23fbdae401378",
    ("train", "free"): "bf7c5d4751a0b617",
    ("heldout", "thirds"): "b7f1269f04098e81",
    ("heldout", "snapped"): "72bfa1af83d0f52b",
    ("heldout", "free"): "18aa52b4ff595c07",
}
PROMPTS = "99171293d411f5fb"
FOLDER = "77d8894d22b8ae91"
RECORDS = "04e7b3397aaa016d"
ORDER = "141e0adbab20f798"
PIXELS = [
    [[95.7, 61.2, 161.5], [62.4, 97.8, 188.1], [89.7, 67.8, 166.2], [110.0, 45.0, 150.0]],
    [[185.6, 47.6, 83.2], [185.7, 47.7, 83.2], [179.9, 54.3, 97.5], [169.7, 66.4, 123.1]],
    [[205.0, 25.0, 35.0], [205.0, 25.0, 35.0], [165.7, 60.6, 48.6], [157.4, 68.2, 51.5]],
]  # mean colour of each quarter, from the left, of three scenes
MIXTURE = "7f7c27f331a87337"


@pytest.mark.parametrize(("split", "places"), SCENES)
def test_scenes_and_captions_are_as_recorded(split, places):
    source = EmojiScenes(split=split, places=places, seed=3)
    indices = [*range(60), 9_999_999]
    facts = [
        (scene.background, scene.style,
         [(o.name, round(o.left, 6), round(o.top, 6), round(o.side, 6)) for o in scene.objects])
        for scene in map(source.facts, indices)
    ]  # fmt: skip
    assert digest((facts, [source.caption(index) for index in indices])) == SCENES[split, places]


def test_held_out_prompts_are_as_recorded():
    assert digest([text for text, _ in heldout_prompts(64, places="thirds")]) == PROMPTS


def test_pixels_of_scenes_are_as_recorded():
    source = EmojiScenes(styles=("twemoji", "fluent"), places="free", seed=3)
    found = [source[index]["image"].reshape(64, 4, 16, 3).mean((0, 2)) for index in range(3)]
    # Decoders of WebP and sums of floats may differ by a level.
    np.testing.assert_allclose(np.stack(found), PIXELS, atol=1.0)


def test_the_held_out_split_of_a_folder_is_as_recorded(data):
    path = data("folder").folder.path
    source = FolderSource(path, split="heldout", heldout=0.25)
    assert digest([entry.name for entry in source.entries]) == FOLDER


def test_the_held_out_split_of_records_is_as_recorded(data):
    path = data("codes").codes.path
    splits = [codes.CodeShards(path, split=split, heldout=0.25) for split in ("heldout", "train")]
    numbers = [[int(s[i]["texts"][0].split()[0]) for i in range(len(s))] for s in splits]
    assert digest(numbers) == RECORDS


def drawn(source, batches, **options):
    loader = make_loader(source, batch_size=7, transform=with_draw, **options)
    found = [next(loader) for _ in range(batches)]
    loader.close()
    keys = [key for key in ("source", "number", "draw") if key in found[0]]
    return [[batch[key].tolist() for key in keys] for batch in found]


def test_the_order_and_the_draws_of_a_loader_are_as_recorded():
    orders = [drawn(Numbers(50), 12, seed=seed) for seed in (0, 7)]
    assert digest(orders) == ORDER
    halves = [drawn(Numbers(50), 2, seed=7, process_index=i, process_count=2) for i in (0, 1)]
    whole = make_loader(Numbers(50), batch_size=14, transform=with_draw, seed=7)
    assert [a[0] + b[0] for a, b in zip(*halves, strict=True)] == [
        next(whole)["number"].tolist() for _ in range(2)
    ]
    whole.close()


def test_the_order_of_a_mixture_is_as_recorded():
    mixture = Mixture((Numbers(30), Numbers(50)), (3.0, 1.0))
    assert digest(drawn(mixture, 12, seed=7)) == MIXTURE
