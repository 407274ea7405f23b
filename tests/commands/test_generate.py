import json

import numpy as np
import pytest
from PIL import Image

import configs.t2i_diffusion
from instella_jax.commands import generate
from instella_jax.errors import UserError
from instella_jax.sampling import album as albums

WEIGHTS = {"folder": "runs/x", "step": 4, "digests": {"checkpoint": "abc"}}


@pytest.fixture
def config():
    return configs.t2i_diffusion.get_config()


def pictures(count):
    return np.random.default_rng(0).integers(0, 256, (count, 16, 16, 3), np.uint8)


def texts(config):
    return [prompt.prompt for prompt in generate.configured_prompts(config.sample)]


def test_prompts_come_from_the_key_or_the_file(config, tmp_path):
    config.sample.prompt = "a cat"
    assert texts(config) == ["a cat"]
    path = tmp_path / "prompts.txt"
    # With the mark that editors of Windows begin a file with.
    path.write_bytes(b"\xef\xbb\xbfa cat\n\n  a dog  \n")
    config.sample.prompts_file = str(path)
    with pytest.raises(UserError, match="not both"):
        generate.configured_prompts(config.sample)
    config.sample.prompt = ""
    assert texts(config) == ["a cat", "a dog"]


@pytest.mark.parametrize(
    ("content", "message"), [("", "is empty"), (None, "cannot be read"), (b"\xff\xfe", "cannot be")]
)
def test_bad_prompt_files_are_one_sentence(config, tmp_path, content, message):
    path = tmp_path / "prompts.txt"
    if content is not None:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    config.sample.prompts_file = str(path)
    with pytest.raises(UserError, match=message):
        generate.configured_prompts(config.sample)


def test_nothing_to_sample_is_said(config):
    with pytest.raises(UserError, match="there is no prompt"):
        generate.configured_prompts(config.sample)


def records(captions, seed=0):
    """What pictures say, two of each prompt."""
    return [
        {"text": text, "seed": seed + number % 2, "steps": 20, "weights": WEIGHTS,
         "made_with": {"instella_jax": "1"}}
        for number, text in enumerate(captions)
    ]  # fmt: skip


def write(folder, drawn, captions, seed=0):
    album, said = albums.Album(folder), records(captions, seed)
    for start in range(0, len(drawn), 3):
        album.add(drawn[start : start + 3], said[start : start + 3])
    return album.close()


def test_files_hold_the_pictures_and_say_how_they_were_made(tmp_path):
    drawn = pictures(4)
    captions = ["A cat / dog!"] * 2 + ["a tree"] * 2
    grid = write(tmp_path, drawn, captions, seed=7)
    rows = [json.loads(line) for line in (tmp_path / "metadata.jsonl").read_text().splitlines()]
    assert [row["text"] for row in rows] == captions
    assert [row["seed"] for row in rows] == [7, 8, 7, 8]
    assert rows[0]["file_name"] == "00000-a-cat-dog-seed7.png" and rows[0]["steps"] == 20
    assert all(row["weights"] == WEIGHTS for row in rows)
    for row, picture in zip(rows, drawn, strict=True):
        with Image.open(tmp_path / row["file_name"]) as image:
            np.testing.assert_array_equal(np.asarray(image), picture)
            assert image.text["Description"] == row["text"]
            assert json.loads(image.text["instella_jax"]) == {
                key: value for key, value in row.items() if key != "file_name"
            }
    assert grid.name == "grid-00000.png" and grid.exists()


def test_nothing_is_overwritten(tmp_path):
    write(tmp_path, pictures(2), ["a cat", "a dog"])
    before = {p.name: p.read_bytes() for p in tmp_path.glob("*.png")}
    write(tmp_path, pictures(2)[::-1], ["a cat", "a dog"])
    after = {p.name: p.read_bytes() for p in tmp_path.glob("*.png")}
    assert len(after) == 2 * len(before)
    assert all(after[name] == data for name, data in before.items())


def test_many_pictures_make_several_grids(tmp_path):
    last = write(tmp_path, pictures(130), ["a cat"] * 130)
    grids = sorted(p.name for p in tmp_path.glob("grid-*.png"))
    assert grids == ["grid-00000.png", "grid-00064.png", "grid-00128.png"]
    assert last.name == grids[-1]
    assert albums.next_number(tmp_path) == 130


def test_images_sampled_before_an_interruption_are_there(tmp_path):
    album = albums.Album(tmp_path)
    album.add(pictures(2), records(["a cat"] * 2))
    rows = (tmp_path / "metadata.jsonl").read_text().splitlines()
    names = sorted(json.loads(row)["file_name"] for row in rows)
    assert names == sorted(p.name for p in tmp_path.glob("*.png")) and len(names) == 2


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "metadata.jsonl").mkdir()
    with pytest.raises(UserError, match="cannot write pictures to .* \\(Is a directory\\)"):
        albums.Album(tmp_path).add(pictures(1), records(["a cat"]))


def test_a_file_in_the_folders_place_is_one_sentence(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write pictures to .* \\(File exists\\)"):
        albums.Album(tmp_path / "file")


@pytest.mark.parametrize(
    ("workdir", "changes", "sentence"),
    [
        ("nowhere", {}, "is not the workdir of a run"),
        (None, {"init_from": "nowhere"}, "no model at nowhere"),
        (None, {"tokenizer": "nowhere"}, "no model at nowhere"),
        (None, {"sample.height": 60}, "image size 60x64 does not fit"),
    ],
)
def test_what_is_refused_leaves_nothing(config, tmp_path, monkeypatch, workdir, changes, sentence):
    monkeypatch.chdir(tmp_path)
    config.sample.prompt = "a cat"
    config.update_from_flattened_dict(changes)
    with pytest.raises(UserError, match=sentence):
        generate.generate(config, workdir)
    assert not list(tmp_path.iterdir())


def test_pictures_of_another_size_begin_a_grid(tmp_path):
    album = albums.Album(tmp_path)
    album.add(pictures(2), records(["a cat"] * 2))
    album.add(pictures(1)[:, :8], records(["a dog"]))
    assert album.close().name == "grid-00002.png" and (tmp_path / "grid-00000.png").exists()


def test_a_grid_of_large_pictures_has_fewer_of_them():
    assert albums.pictures_in_a_grid(512, 512) == 64
    assert albums.pictures_in_a_grid(2048, 1024) == 32
    assert albums.pictures_in_a_grid(20_000, 20_000) == 1
