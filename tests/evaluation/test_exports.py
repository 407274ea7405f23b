"""Each layout is read back as that benchmark's own programs read it."""

import csv
import json
import os
import re
import zipfile

import numpy as np
import pytest
from PIL import Image

from instella_jax.commands.measure import BENCHMARKS
from instella_jax.errors import UserError
from instella_jax.evaluation.exports import export
from instella_jax.evaluation.layouts import LAYOUTS, read_pieces
from instella_jax.sampling.options import Options
from instella_jax.sampling.sampler import Samples

SIDE = 8


def picture(prompt, seed):
    """The picture of a prompt and a seed: nothing else decides, and it is nowhere black."""
    words = np.frombuffer(prompt.encode(), np.uint8).astype(int)
    rng = np.random.default_rng([seed, *words])
    return rng.integers(1, 256, (SIDE, SIDE, 3), np.uint8)


class Painter:
    """Samples by `picture`, three at a time; ends after a number of batches."""

    def __init__(self, batches=10**9):
        self.left, self.sampled = batches, []

    def batches(self, requests, options):
        rows = [(request.prompt, request.seed) for request in requests]
        for start in range(0, len(rows), 3):
            if not self.left:
                raise KeyboardInterrupt
            self.left -= 1
            self.sampled += rows[start : start + 3]
            images = np.stack([picture(*row) for row in rows[start : start + 3]])
            yield Samples(images, np.zeros((len(images), 1, 1), bool))


def run(benchmark, prompts, out, count=None, sampler=None, seed=0, weights="a"):
    sampler = sampler or Painter()
    paths = prompts if isinstance(prompts, list) else [prompts]
    pieces = read_pieces(benchmark, paths, count or LAYOUTS[benchmark].count, "ours")
    export(benchmark, pieces, sampler, Options(seed=seed), out, {"weights": weights})
    return sampler


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def write_lines(path, lines):
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def test_the_command_knows_all_layouts():
    assert set(BENCHMARKS) == set(LAYOUTS) and len(BENCHMARKS) == 9


def geneval_file(folder, count=5):
    lines = [
        json.dumps({"tag": "single_object", "include": [{"class": "bench", "count": n}],
                    "prompt": f"a photo of {n} bénches"}, ensure_ascii=n % 2 == 0)
        for n in range(count)
    ]  # fmt: skip
    return write_lines(folder / "evaluation_metadata.jsonl", lines), lines


def test_geneval(tmp_path):
    path, lines = geneval_file(tmp_path)
    run("geneval", path, tmp_path / "out", seed=3)
    found = 0
    for subfolder in os.listdir(tmp_path / "out"):
        folder = tmp_path / "out" / subfolder
        assert folder.is_dir() and subfolder.isdigit() and len(subfolder) == 5
        with open(folder / "metadata.jsonl") as file:
            metadata = json.load(file)
        assert metadata == json.loads(lines[int(subfolder)])
        for name in os.listdir(folder / "samples"):
            assert re.match(r"\d+\.png", name)
            expected = picture(metadata["prompt"], 3 + int(name[:4]))
            np.testing.assert_array_equal(pixels(folder / "samples" / name), expected)
            found += 1
    assert found == 20


def test_geneval2(tmp_path):
    records = [{"prompt": f"{n} cows", "atom_count": 3, "vqa_list": []} for n in range(4)]
    path = write_lines(tmp_path / "geneval2_data.jsonl", map(json.dumps, records))
    run("geneval2", path, tmp_path / "out")
    paths = json.loads((tmp_path / "out" / "image_paths.json").read_text())
    for record in records:
        np.testing.assert_array_equal(pixels(paths[record["prompt"]]), picture(record["prompt"], 0))


def test_dpg_bench(tmp_path):
    (tmp_path / "prompts").mkdir()
    for name in ("1", "partiprompts9"):
        (tmp_path / "prompts" / f"{name}.txt").write_text(f"scene {name}\n")
    run("dpg-bench", tmp_path / "prompts", tmp_path / "out")
    assert sorted(os.listdir(tmp_path / "out")) == ["1.png", "partiprompts9.png"]
    for name in os.listdir(tmp_path / "out"):
        image = Image.open(tmp_path / "out" / name)
        boxes = [(0, 0), (SIDE, 0), (0, SIDE), (SIDE, SIDE)]
        for seed, (x, y) in enumerate(boxes):
            crop = np.asarray(image.crop((x, y, x + SIDE, y + SIDE)))
            np.testing.assert_array_equal(crop, picture(f"scene {name.split('.')[0]}", seed))
    (tmp_path / "prompts" / "a.b.txt").write_text("x")
    with pytest.raises(UserError, match="second dot"):
        run("dpg-bench", tmp_path / "prompts", tmp_path / "other")


def test_t2i_compbench(tmp_path):
    prompts = ["a red bench and a blue car", "a cat, on the left of a dog"]
    path = write_lines(tmp_path / "color_val.txt", [f"{p}\tseen" for p in prompts])
    run("t2i-compbench", path, tmp_path / "examples", count=2)
    names = os.listdir(tmp_path / "examples" / "samples")
    names.sort(key=lambda name: int(name.split("_")[-1].split(".")[0]))
    assert [re.search(r"_(\d{6})\.png$", n)[1] for n in names] == [f"{n:06d}" for n in range(4)]
    for number, name in enumerate(names):
        prompt = name.split("_")[0]
        assert prompt == prompts[number // 2]
        expected = picture(prompt, number % 2)
        np.testing.assert_array_equal(pixels(tmp_path / "examples/samples" / name), expected)
    for bad in ("a/b", "a_b"):
        with pytest.raises(UserError, match="cannot be a file's name"):
            run("t2i-compbench", write_lines(tmp_path / "bad.txt", [bad]), tmp_path / "other")
    long = write_lines(tmp_path / "long.txt", ["word " * 60])
    with pytest.raises(UserError, match="too long"):
        run("t2i-compbench", long, tmp_path / "other")


def test_oneig(tmp_path):
    categories = {
        "Anime_Stylization": "anime", "Portrait": "human", "General_Object": "object",
        "Text_Rendering": "text", "Knowledge_Reasoning": "reasoning",
        "Multilingualism": "multilingualism",
    }  # fmt: skip
    records = [
        {"category": c, "id": f"{n:03d}", "prompt_en": f"{c} {n}"}
        for c in categories
        for n in (0, 7)
    ]
    path = tmp_path / "OneIG-Bench.json"
    path.write_text(json.dumps(records))
    run("oneig", path, tmp_path / "images", count=3)
    for record in records:
        folder = tmp_path / "images" / categories[record["category"]] / "ours"
        (found,) = folder.glob(record["id"] + "*")
        assert found.suffix == ".webp"
        grid = Image.open(found)
        width, height = grid.width // 2, grid.height // 2
        images = []
        for i in range(2):
            for j in range(2):
                box = (j * width, i * height, (j + 1) * width, (i + 1) * height)
                images.append(np.asarray(grid.crop(box).convert("RGB")))
        # A black image stands for one that is missing.
        assert [bool(image.any()) for image in images] == [True, True, True, False]
        for seed in range(3):
            np.testing.assert_array_equal(images[seed], picture(record["prompt_en"], seed))


def test_wise(tmp_path):
    records = [{"prompt_id": n, "Prompt": f"fruit {n}", "Explanation": "x"} for n in range(1, 6)]
    paths = [tmp_path / "culture.json", tmp_path / "science.json"]
    paths[0].write_text(json.dumps(records[:2]))
    paths[1].write_text(json.dumps(records[2:]))
    run("wise", paths, tmp_path / "out")
    prompts = {item["prompt_id"]: item for path in paths for item in json.loads(path.read_text())}
    for number, item in prompts.items():
        image = pixels(os.path.join(tmp_path / "out", f"{number}.png"))
        np.testing.assert_array_equal(image, picture(item["Prompt"], 0))
    assert len(os.listdir(tmp_path / "out")) == 5


@pytest.mark.parametrize("words", ["en", "zh_long"])
def test_unigenbench(tmp_path, words):
    language = words.split("_")[0]
    path = tmp_path / f"test_prompts_{words}.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["index", f"prompt_{language}", "sub_dims"])
        writer.writeheader()
        for n in range(3):
            row = {"index": n, f"prompt_{language}": f'two, "{n}"\nlines', "sub_dims": "{}"}
            writer.writerow(row)
    run("unigenbench", path, tmp_path / "data")
    folder = tmp_path / "data" / words / "ours"
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            for j in range(4):
                found = pixels(folder / f"{int(row['index'])}_{j}.png")
                np.testing.assert_array_equal(found, picture(row[f"prompt_{language}"], j))
    assert len(os.listdir(folder)) == 12


def test_hpsv3(tmp_path):
    path = write_lines(tmp_path / "prompts.txt", ["a cat", "a dog"])
    run("hpsv3", path, tmp_path / "out", count=2)

    def reward(image_paths, prompts):
        return [np.array_equal(pixels(i), picture(p, n % 2)) for n, (i, p) in
                enumerate(zip(image_paths, prompts, strict=True))]  # fmt: skip

    lists = json.loads((tmp_path / "out" / "hpsv3.json").read_text())
    assert reward(**lists) == [True] * 4 and lists["prompts"] == ["a cat"] * 2 + ["a dog"] * 2


def test_adm(tmp_path):
    path = write_lines(tmp_path / "prompts.txt", [f"thing {n}" for n in range(5)])
    run("adm", path, tmp_path / "samples.npz", count=2)
    with np.load(tmp_path / "samples.npz") as file:
        numbers = file["arr_0"]
    assert numbers.dtype == np.uint8 and numbers.shape == (10, SIDE, SIDE, 3)
    expected = [picture(f"thing {n}", seed) for n in range(5) for seed in (0, 1)]
    np.testing.assert_array_equal(numbers, expected)
    # What the evaluator does to read it in parts: the header of the member, then the rows.
    with zipfile.ZipFile(tmp_path / "samples.npz").open("arr_0.npy") as member:
        assert np.lib.format.read_magic(member) == (1, 0)
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(member)
    assert (shape, fortran, dtype) == ((10, SIDE, SIDE, 3), False, np.uint8)
    assert not list(tmp_path.glob("*.parts"))
    assert not run("adm", path, tmp_path / "samples.npz", count=2).sampled


@pytest.mark.parametrize("batches", [2, 4])
@pytest.mark.parametrize("benchmark", ["geneval", "adm"])
def test_an_interrupted_export_goes_on(tmp_path, batches, benchmark):
    path, _ = geneval_file(tmp_path)
    if benchmark == "adm":
        path = write_lines(tmp_path / "p.txt", [f"thing {n}" for n in range(20)])
    out, whole = (tmp_path / f"{name}.npz" for name in ("out", "whole"))
    with pytest.raises(KeyboardInterrupt):
        run(benchmark, path, out, sampler=Painter(batches))
    second = run(benchmark, path, out)
    assert 0 < len(second.sampled) < 20
    run(benchmark, path, whole)
    contents = [
        {f.relative_to(top): f.read_bytes() for f in [*top.rglob("*"), top] if f.is_file()}
        for top in (out, whole)
    ]
    assert contents[0].keys() == contents[1].keys()
    if benchmark == "geneval":
        assert contents[0] == contents[1]
    else:
        with np.load(out) as a, np.load(whole) as b:
            np.testing.assert_array_equal(a["arr_0"], b["arr_0"])
    assert not run(benchmark, path, out).sampled


def test_other_settings_do_not_mix(tmp_path):
    path, _ = geneval_file(tmp_path)
    run("geneval", path, tmp_path / "out")
    with pytest.raises(UserError, match="begun with another sampling"):
        run("geneval", path, tmp_path / "out", seed=1)
    with pytest.raises(UserError, match="begun with another weights"):
        run("geneval", path, tmp_path / "out", weights="b")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").touch()
    with pytest.raises(UserError, match="no export's"):
        run("geneval", path, tmp_path / "mine")


def test_a_prompt_that_comes_again_goes_on_counting(tmp_path):
    path = write_lines(tmp_path / "p.txt", ["a cat", "a dog", "a cat"])
    run("adm", path, tmp_path / "out.npz", count=2, seed=10)
    with np.load(tmp_path / "out.npz") as file:
        numbers = file["arr_0"]
    rows = [
        ("a cat", 10),
        ("a cat", 11),
        ("a dog", 10),
        ("a dog", 11),
        ("a cat", 12),
        ("a cat", 13),
    ]
    np.testing.assert_array_equal(numbers, [picture(*row) for row in rows])


@pytest.mark.parametrize(
    ("benchmark", "text", "sentence"),
    [
        ("geneval", "not JSON", "expected a JSON object with a prompt"),
        ("geneval", '{"tag": "x"}', "expected a JSON object with a prompt"),
        ("geneval", "", "holds no prompt"),
        ("wise", '{"a": 1}', "expected a list of objects"),
        ("wise", '[{"prompt_id": "x", "Prompt": "y"}]', "a number .* cannot be read"),
        ("wise", '[{"prompt_id": 1}]', "none of the fields Prompt"),
        ("oneig", '[{"category": "Soup", "id": "1", "prompt_en": "y"}]', "no category 'Soup'"),
        ("oneig", '[{"category": "Portrait", "id": "../1", "prompt_en": "y"}]', "file's name"),
        ("hpsv3", "\n\n", "holds no prompt"),
    ],
)
def test_prompt_files_that_cannot_be_used_are_one_sentence(tmp_path, benchmark, text, sentence):
    path = tmp_path / "prompts.json"
    path.write_text(text)
    with pytest.raises(UserError, match=sentence):
        run(benchmark, path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_two_prompts_for_one_file_are_refused(tmp_path):
    records = [{"prompt_id": 1, "Prompt": "a"}, {"prompt_id": 1, "Prompt": "b"}]
    path = tmp_path / "wise.json"
    path.write_text(json.dumps(records))
    with pytest.raises(UserError, match="two prompts would be written to 1.png"):
        run("wise", path, tmp_path / "out")
    with pytest.raises(UserError, match="5 images a prompt: dpg-bench takes 1 to 4"):
        run("dpg-bench", path, tmp_path / "out", count=5)
