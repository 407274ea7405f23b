import numpy as np
import pytest

import configs.t2i_diffusion
from instella_jax.commands import evaluate
from instella_jax.data.scenes.source import heldout_prompts, render
from instella_jax.evaluation import scenes


class Painter:
    """A pipeline that knows what each held-out prompt should show."""

    tokenizer, params = None, {"tokenizer": None}

    def __init__(self, count, wrong=()):
        self.scenes = dict(heldout_prompts(count, places="thirds"))
        self.wrong = set(wrong)

    def __call__(self, prompts, options):
        pictures = [render(self.scenes[prompt], 64) for prompt in prompts]
        for index in self.wrong:
            pictures[index] = 255 - pictures[index]
        return np.stack(pictures)


@pytest.fixture
def same_code(monkeypatch):
    monkeypatch.setattr(scenes, "through_code", lambda network, params, pictures: pictures)


def test_true_pictures_are_all_right(same_code):
    config = configs.t2i_diffusion.get_config()
    report = scenes.prompts_report(Painter(12), config, 12)
    assert set(report.sampled.values()) == {1.0} and set(report.ceiling.values()) == {1.0}
    assert len(report.prompts) == len(report.pictures) == 12


def test_wrong_pictures_are_counted(same_code):
    config = configs.t2i_diffusion.get_config()
    report = scenes.prompts_report(Painter(12, wrong=range(3)), config, 12)
    assert report.sampled["background"] == pytest.approx(0.75)
    assert report.ceiling["background"] == 1.0


def test_psnr_by_hand():
    a = np.zeros((2, 8, 8, 3), np.uint8)
    b = a.copy()
    b[0] += 1  # an error of 1 everywhere: 20 log10(255)
    b[1] += 10
    assert scenes.mean_psnr(a, b) == pytest.approx(20 * np.log10(255) - 10)


def test_a_config_is_evaluated_from_a_model_folder(
    tiny_tokenizer_config, tiny_tokenizer_folder, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluate, "report_scenes", lambda *_: {})  # 64-pixel scenes are not tiny
    with tiny_tokenizer_config.unlocked():
        tiny_tokenizer_config.init_from = str(tiny_tokenizer_folder)
    tiny_tokenizer_config.mesh.data = -1
    metrics = evaluate.evaluate_config(tiny_tokenizer_config, None)
    # Random weights draw grey: far below what any training reaches, and finite.
    assert 0 < metrics["psnr"] < 15 and 0 <= metrics["bits_on"] <= 1
    assert f"psnr {metrics['psnr']:.4f}" in capsys.readouterr().out
    assert (tmp_path / "drawn/reconstruction.json").exists()
