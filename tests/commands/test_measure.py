"""`instella-jax eval` from its command line to its files."""

import json
import re

import jax
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from instella_jax import cli
from instella_jax.data.scenes.source import EmojiScenes
from instella_jax.errors import UserError
from instella_jax.evaluation import feature_sets, picture_sets
from instella_jax.reporting.pictures import save_png
from tests.evaluation.test_clip import torch_model
from tests.losses.test_perceptual import as_torch_names, random_weights
from tests.needs_torch import needs_torch


def eval_(*arguments):
    cli.run(["eval", *(str(argument) for argument in arguments)])


@pytest.fixture
def scenes(tmp_path):
    source = EmojiScenes(split="heldout", places="thirds")
    for number in range(6):
        save_png(tmp_path / "scenes" / f"{number}.png", source[number]["image"])
    return tmp_path / "scenes"


def report_of(folder):
    report = json.loads((folder / "report.json").read_text())
    assert {"command", "versions", "devices", "date"} <= report["provenance"].keys()
    assert (folder / "report.md").read_text().startswith("| ")
    return report


@pytest.mark.slow
def test_scene_eval_says_all_that_is_needed_to_repeat_it(tmp_path, capsys):
    tasks = "single_object,counting"
    eval_("scenes", "demo", "--prompts=2", "--images-per-prompt=2", f"--tasks={tasks}",
          "--steps=4", "--seed=5", "--out", tmp_path / "out")  # fmt: skip
    report = report_of(tmp_path / "out")
    assert report["sampling"]["steps"] == 4 and report["sampling"]["seed"] == 5
    assert report["sampling"]["guidance"] == 1.0  # the demo's
    assert set(report["weights"]["digests"]) == {"generator", "text", "tokenizer"}
    assert list(report["scores"]) == ["single_object", "counting", "overall"]
    assert len(report["images"]) == 8
    for task in ("single_object", "counting"):
        shares = [image["right"] for image in report["images"] if image["task"] == task]
        assert report["scores"][task]["correct"] == pytest.approx(np.mean(shares))
    assert "| overall |" in capsys.readouterr().out
    with Image.open(tmp_path / "out" / "pictures.png") as image:
        image.verify()


@pytest.mark.slow
def test_an_export_holds_the_pictures_of_the_model(tmp_path):
    from instella_jax.sampling.load import load_sampler
    from instella_jax.sampling.options import Options

    prompts = ["a cat on a red background", "two dogs on a blue background"]
    path = tmp_path / "evaluation_metadata.jsonl"
    path.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in prompts))
    for _ in range(2):  # the second time there is nothing left to do
        eval_("export", "geneval", "demo_ar", "--prompts", path, "--images-per-prompt=2",
              "--seed=3", "--out", tmp_path / "out")  # fmt: skip
    import configs.t2i_ar

    config = configs.t2i_ar.get_config()
    sampler, _ = load_sampler(config, None)
    options = Options(images_per_prompt=2, seed=3, guidance=1.0, temperature=0.5)
    expected = sampler(prompts, options)
    found = [
        np.asarray(Image.open(tmp_path / "out" / f"{row:05d}" / "samples" / f"{n:04d}.png"))
        for row in range(2)
        for n in range(2)
    ]
    np.testing.assert_allclose(np.stack(found).astype(int), expected, atol=1)


@pytest.mark.slow
def test_rfid_is_the_distance_of_crops_and_copies(tmp_path, scenes, monkeypatch, capsys):
    from instella_jax.codec.tokenizer import BinaryTokenizer
    from instella_jax.evaluation.frechet import frechet_distance
    from instella_jax.stages.tokenizer import reconstruct

    monkeypatch.setenv("INSTELLA_JAX_CACHE", str(tmp_path / "cache" / "xla"))
    monkeypatch.setattr(feature_sets, "_VGG_SIDE", 32)  # in place of minutes on one core
    vgg, heads = as_torch_names(random_weights())
    for name, tensors in (("vgg", vgg), ("heads", heads)):
        save_file(tensors, tmp_path / f"{name}.safetensors")
    weights = f"{tmp_path}/vgg.safetensors,{tmp_path}/heads.safetensors"
    eval_("rfid", "demo", scenes, "--vgg", weights, "--precision-recall", "--batch-size=8",
          "--out", tmp_path / "out")  # fmt: skip
    report = report_of(tmp_path / "out")
    said = capsys.readouterr().out
    assert "no FID" in said and "fewer than 10,000" in said
    assert set(report["scores"]) == {"vgg_frechet_distance", "precision", "recall"}
    assert report["pictures"] == {"reference": 6, "generated": 6}
    # The same by hand: the files are as large as the tokenizer's pictures, so that no crop is cut.
    originals = np.stack([np.asarray(Image.open(f)) for f in sorted(scenes.glob("*.png"))])
    tokenizer = BinaryTokenizer.from_pretrained("demo")
    images = jax.numpy.array(originals)
    copies = np.asarray(reconstruct(tokenizer.network, tokenizer.params, images)[0])
    extractor = feature_sets.vgg_extractor(weights)
    both = [
        feature_sets.measure(
            picture_sets.PictureSet(range(6), images.__getitem__), extractor, batch_size=8
        )
        for images in (copies, originals)
    ]
    expected = frechet_distance(*(one.statistics for one in both))
    assert report["scores"]["vgg_frechet_distance"] == pytest.approx(expected, rel=1e-3)
    assert len(list((tmp_path / "cache" / "statistics").iterdir())) == 2


@needs_torch
@pytest.mark.slow
def test_clip_score_of_a_folder(tmp_path, scenes):
    (tmp_path / "clip").mkdir()
    torch_model(tmp_path / "clip")
    lines = [json.dumps({"file_name": f"{n}.png", "text": "a cat"}) for n in range(6)]
    (scenes / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    eval_("clip", scenes, "--clip", tmp_path / "clip", "--batch-size=4", "--out", tmp_path / "out")
    report = report_of(tmp_path / "out")
    assert report["scores"]["clip_score"] == pytest.approx(np.mean([*report["pictures"].values()]))
    assert len(report["pictures"]) == 6


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            "scenes demo --out OUT --tasks soup",
            "--tasks names soup: expected some of",
        ),
        ("scenes demo --out OUT --prompts 0", "must be at least 1"),
        ("scenes nowhere --out OUT", "no model at nowhere"),
        ("scenes demo_ar --out OUT --steps 9", "demo_ar takes no --steps"),
        ("scenes demo --out .", ". is there already"),
        ("export adm demo --prompts x --out OUT", "expected a name with .npz"),
        ("export geneval demo --prompts nowhere --out OUT", "nowhere cannot be read"),
        ("fid nowhere nowhere --vgg", "nowhere is no folder of pictures"),
        ("rfid demo nowhere --vgg", "nowhere is no folder of pictures"),
        ("clip nowhere --clip x", "metadata.jsonl cannot be read"),
        ("inception nowhere OUT", "expected a name with .safetensors"),
    ],
)
def test_mistakes_are_one_sentence(tmp_path, arguments, sentence):
    words = [str(tmp_path / "out") if w == "OUT" else w for w in arguments.split()]
    with pytest.raises(UserError, match=re.escape(sentence)):
        eval_(*words)
    assert not list(tmp_path.iterdir())


def test_no_features_are_no_fid(capsys):
    with pytest.raises(SystemExit):
        eval_("fid", ".", ".")
    assert "--inception" in capsys.readouterr().err
