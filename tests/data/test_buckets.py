"""Buckets: which picture goes where, and what a loader makes of them."""

import contextlib
import json
import logging
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image
from test_shards import png

from instella_jax.config import data
from instella_jax.data import buckets
from instella_jax.data.folder import FolderSource
from instella_jax.data.image_sizes import sizes_path
from instella_jax.data.shards import ImageShards, Shard, shard_writer, write_dataset_file
from instella_jax.data.sources import make_split
from instella_jax.errors import UserError
from instella_jax.preparing.filters import Filters
from instella_jax.preparing.importing import import_dataset

SHAPES = "16x16,16x32,32x16"
# Height and width of pictures for each of them.
FITTING = {(16, 16): (20, 21), (16, 32): (22, 43), (32, 16): (50, 24)}


def expected(width, height, shapes):
    """The rule in words: with whole numbers, one shape after the other."""
    if not width or not height:
        return -1

    def order(item):
        number, (h, w) = item
        ratio = Fraction(width, height) / Fraction(w, h)
        covered = w <= width and h <= height
        return not covered, max(ratio, 1 / ratio), -h * w if covered else h * w, number

    return min(enumerate(shapes), key=order)[0]


def test_assignment_against_the_rule_one_by_one():
    rng = np.random.default_rng(0)
    for _ in range(12):
        shapes = list({tuple(int(x) for x in rng.integers(1, 9, 2) * 8) for _ in range(6)})
        # Small numbers, so that many are equal; and a picture of each shape itself.
        sizes = np.concatenate([rng.integers(0, 90, (60, 2)), np.array(shapes)[:, ::-1]])
        found = buckets.assign(sizes.astype(np.int32), shapes)
        assert found.tolist() == [expected(int(w), int(h), shapes) for w, h in sizes]
        assert found[-len(shapes) :].tolist() == list(range(len(shapes)))


def test_assignment_of_more_than_one_chunk(monkeypatch):
    sizes = np.random.default_rng(1).integers(1, 2000, (50, 2))
    shapes = buckets.parse_shapes("512x512,384x640,640x384")
    whole = buckets.assign(sizes, shapes)
    monkeypatch.setattr(buckets, "_CHUNK", 7)
    assert buckets.assign(sizes, shapes).tolist() == whole.tolist()


def test_small_buckets_give_their_pictures_to_the_others(caplog):
    shapes = buckets.parse_shapes("64x64,32x64,64x32,128x128")
    sizes = np.array([[64, 64]] * 5 + [[90, 40]] * 3 + [[40, 90]] * 4 + [[0, 0]])
    left = [shapes[0], shapes[2]]
    without = [expected(*map(int, size), left) for size in sizes]
    found = buckets.sort(sizes, shapes, 4)
    assert found.tolist() == [{-1: -1, 0: 0, 1: 2}[number] for number in without]
    assert [r.getMessage() for r in caplog.records] == [
        "the bucket 32x64 has 3 picture(s), fewer than one batch of 4: they go to others"
    ]
    # The last one stays, however few there are.
    assert set(buckets.sort(sizes[:2], shapes, 10).tolist()) == {0}


@pytest.mark.parametrize(
    "text", ["512", "512x", "512x512,", "512*512", "-1x5", "0x16", "a", "16x16,16x16", "1x123456"]
)
def test_what_is_no_list_of_shapes(text):
    with pytest.raises(UserError, match="expected HEIGHTxWIDTH in pixels.*384x640"):
        buckets.parse_shapes(text)


def test_shapes_of_a_config_are_the_largest_first(tiny_tokenizer_config):
    config = tiny_tokenizer_config
    assert buckets.shapes(config) == ((32, 32),)
    config.data.update(kind="folder", buckets=" 16x16, 32x16 ,16x32")
    assert buckets.shapes(config) == ((32, 16), (16, 32), (16, 16))


def test_buckets_where_there_can_be_none(tiny_tokenizer_config, tiny_diffusion_config):
    tiny_tokenizer_config.data.buckets = "32x32"
    with pytest.raises(UserError, match="data.kind is 'scenes': use 'folder' or 'shards'"):
        make_split(tiny_tokenizer_config.data, "train", captions=False, batch_size=2)
    tiny_diffusion_config.data.update(kind="folder", buckets="32x32")
    with pytest.raises(UserError, match="is for the tokenizer.*leave data.buckets empty"):
        make_split(tiny_diffusion_config.data, "train", captions=True, batch_size=2)
    with pytest.raises(UserError, match="is for the tokenizer"):
        buckets.shapes(tiny_diffusion_config)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """40 pictures of three shapes, and the shape of each.

    A picture has one colour, its number. Number 3 breaks off after its header, number 25 is turned
    by its EXIF entry.
    """
    path = tmp_path_factory.mktemp("pictures")
    counts = {(16, 16): 24, (16, 32): 8, (32, 16): 8}
    wanted = [shape for shape, count in counts.items() for _ in range(count)]
    for number, shape in enumerate(wanted):
        save(path / f"{number:02}.png", number, FITTING[shape], turned=number == 25)
    data = (path / "03.png").read_bytes()
    (path / "03.png").write_bytes(data[:60])
    return path, wanted


def save(path, value, size, turned=False):
    size = size[::-1] if turned else size
    exif = Image.Exif()
    if turned:
        exif[0x0112] = 6
    Image.fromarray(np.full((*size, 3), value, np.uint8)).save(path, exif=exif)


def settings(kind, path, **changes):
    config = ConfigDict(data(16, kind))
    config.update(buckets=SHAPES, workers=0)
    config[kind].update(path=str(path), heldout=0.01, **changes)
    return config


def numbers(batch):
    """The numbers of the pictures of a batch, each of one colour."""
    images = batch["image"]
    assert (images == images[..., :1, :1, :1]).all()
    return images[..., 0, 0, 0].ravel().tolist()


def test_sizes_of_a_folder_are_those_shown(folder):
    path, wanted = folder
    source = FolderSource(path, captions=False)
    sizes = source.sizes()
    assert sizes.dtype == np.int32
    assert [tuple(size[::-1]) for size in sizes.tolist()] == [FITTING[s] for s in wanted]


def read(config, count, state=None, **options):
    """Items of a training loader, and its state after them."""
    options = {"batch_size": 4, **options}
    loader = make_split(config, "train", captions=False, **options)
    with contextlib.closing(loader):
        if state is not None:
            loader.set_state(state)
        return [next(loader) for _ in range(count)], loader.get_state()


def test_every_batch_has_one_shape_and_an_epoch_shows_everything_once(folder, capsys, caplog):
    path, wanted = folder
    config = settings("folder", path)
    (held,) = numbers(next(make_split(config, "heldout", captions=False, batch_size=1)))
    batches, _ = read(config, 40)
    assert len({batch["image"].shape for batch in batches}) == 3
    seen, skipped = ({shape: [] for shape in FITTING} for _ in range(2))
    for batch in batches:
        assert batch["image"].shape[0] == 4 and batch["image"].dtype == np.uint8
        seen[batch["image"].shape[1:3]].append(numbers(batch))
        skipped[batch["image"].shape[1:3]].append(batch["skipped_before"])
    told = capsys.readouterr().out
    for shape, found in seen.items():
        members = [n for n, s in enumerate(wanted) if s == shape and n != held]
        assert f"bucket {shape[0]}x{shape[1]}: {len(members)} pictures\n" in told
        # As many batches as its share of the pictures.
        assert len(found) == pytest.approx(40 * len(members) / 39, abs=1)
        # The places of the stream that they are from, each row on its own.
        rounds = np.arange(len(found))[:, None] + np.cumsum(skipped[shape], axis=0)
        epochs = (4 * rounds + np.arange(4)) // len(members)
        for epoch in range(4 * int(rounds[-1].min() + 1) // len(members)):
            shown = np.array(found)[epochs == epoch].tolist()
            assert sorted(shown) == [n for n in members if n != 3]
        assert np.any(skipped[shape]) == (3 in members)
    assert sum("03.png cannot be read" in r.getMessage() for r in caplog.records) == 1


@pytest.mark.parametrize("groups", [None, 2])
def test_a_loader_in_buckets_resumes_exactly(folder, groups):
    config = settings("folder", folder[0])
    whole, _ = read(config, 12, steps_per_call=groups)
    leading = (4,) if groups is None else (groups, 4)
    assert all(item["image"].shape[: len(leading)] == leading for item in whole)
    for stop in (1, 5):
        _, state = read(config, stop, steps_per_call=groups)
        after, _ = read(config, 12 - stop, json.loads(json.dumps(state)), steps_per_call=groups)
        for item, again in zip(whole[stop:], after, strict=True):
            np.testing.assert_array_equal(item["image"], again["image"])


def test_two_processes_make_the_batches_of_one(tmp_path):
    for number in range(24):
        save(tmp_path / f"{number}.png", number, list(FITTING.values())[number % 3])
    config = settings("folder", tmp_path)
    alone, _ = read(config, 10)
    halves = [
        read(config, 10, batch_size=2, process_index=index, process_count=2)[0] for index in (0, 1)
    ]
    for whole, *parts in zip(alone, *halves, strict=True):
        joined = np.concatenate([part["image"] for part in parts])
        np.testing.assert_array_equal(whole["image"], joined)


@pytest.mark.thorough
def test_worker_processes_keep_shapes_apart_and_resume(folder):
    config = settings("folder", folder[0])
    config.workers = 2
    batches, _ = read(config, 12)
    after, _ = read(config, 7, read(config, 5)[1])
    for batch, again in zip(batches[5:], after, strict=True):
        np.testing.assert_array_equal(batch["image"], again["image"])
    shapes = Counter(batch["image"].shape[1:3] for batch in batches)
    assert sum(shapes.values()) == 12 and set(shapes) == set(FITTING)
    for batch in batches:
        assert {folder[1][n] for n in numbers(batch)} == {batch["image"].shape[1:3]}


def write(folder, values, shapes):
    """A data set of pictures of one colour each, a shard for every ten."""
    folder.mkdir()
    shards = []
    for start in range(0, len(values), 10):
        path = folder / f"{start}.arrayrecord"
        with shard_writer(path, path.with_suffix(".scratch")) as writer:
            for value, shape in list(zip(values, shapes, strict=True))[start : start + 10]:
                height, width = FITTING[shape]
                header = {"key": f"k{value}", "texts": ["x"], "size": [width, height]}
                writer.write(header, png(value, height, width))
        shards.append(Shard(path.name, writer.records, path.stat().st_size))
    write_dataset_file(folder, "images", shards, {})
    return folder


def test_mixtures_keep_their_weights_in_buckets(tmp_path):
    square, wide = (16, 16), (16, 32)
    # Half of a is square, a quarter of b; b is drawn three times as often.
    a = write(tmp_path / "a", list(range(16)), [square] * 8 + [wide] * 8)
    b = write(tmp_path / "b", list(range(100, 132)), [square] * 8 + [wide] * 24)
    config = settings("shards", f"{a},{b}", weights="1:3")
    batches, _ = read(config, 120, batch_size=8)
    counts, seen = Counter(), Counter()
    for batch in batches:
        for source, value in zip(batch["source"].tolist(), numbers(batch), strict=True):
            assert source == (value >= 100)
            counts[source, batch["image"].shape[1:3]] += 1
            seen[value] += 1
    total = sum(counts.values())
    for source, weight, splits in ((0, 0.25, (1 / 2, 1 / 2)), (1, 0.75, (1 / 4, 3 / 4))):
        for shape, share in zip((square, wide), splits, strict=True):
            assert counts[source, shape] / total == pytest.approx(weight * share, abs=0.03)
    for low, high in ((0, 100), (100, 200)):
        times = [n for value, n in seen.items() if low <= value < high]
        assert max(times) <= 1.5 * min(times)


@pytest.mark.parametrize("split", ["all", "train", "heldout"])
@pytest.mark.parametrize("damage", ["", "missing", "cut", "other"])
def test_sizes_of_shards_with_and_without_their_file(tmp_path, caplog, split, damage):
    caplog.set_level(logging.WARNING)
    shapes = [list(FITTING)[n % 3] for n in range(25)]
    folder = write(tmp_path / "set", list(range(25)), shapes)
    path = sizes_path(folder / "10.arrayrecord")
    if damage == "missing":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:70])
    elif damage == "other":
        np.save(path, np.ones((3, 2), np.int32))
    source = ImageShards(folder, split=split, heldout=0.2)
    sizes = source.sizes()
    shown = [source[index]["image"].shape[1::-1] for index in range(len(source))]
    assert sizes.tolist() == [list(size) for size in shown]
    assert ("is read for its sizes" in caplog.text) == bool(damage)


def test_an_import_writes_the_sizes_that_are_shown(folder, tmp_path, caplog):
    import_dataset(folder[0], tmp_path / "set", filters=Filters(captions=False), unit_size=15)
    source = ImageShards(tmp_path / "set", captions=False)
    sizes = source.sizes().tolist()
    # All but number 3, which is broken.
    assert sizes == [list(FITTING[s][::-1]) for n, s in enumerate(folder[1]) if n != 3]
    assert "is read for its sizes" not in caplog.text


def test_large_pictures_are_decoded_no_smaller_than_their_bucket_needs(tmp_path):
    path = tmp_path / "0.jpg"
    Image.fromarray(np.zeros((400, 800, 3), np.uint8)).save(path)
    source = FolderSource(tmp_path, captions=False, decode_side=16)
    assert source[0]["image"].shape[:2] == (50, 100)
    assert source.decoded_at(60)[0]["image"].shape[:2] == (100, 200)
    assert source[0]["image"].shape[:2] == (50, 100)
