"""The learning curve: keys that there are, real processes, a plot."""

import ast

import pytest
from PIL import Image

from benchmarks import learning_curve
from configs import t2i_diffusion
from instella_jax.config_keys import check_value, flat
from instella_jax.errors import UserError


def test_every_row_changes_keys_of_the_demo():
    known = dict(flat(t2i_diffusion.get_config()))
    for _, keys in learning_curve.ROWS.values():
        for name, text in (key.split("=") for key in keys):
            value = text if isinstance(known[name], str) else ast.literal_eval(text)
            check_value(name, value)
            assert value != known[name]


@pytest.mark.thorough
def test_a_run_gives_its_figures_and_a_failed_one_its_sentence(tmp_path):
    options = ("train.steps=0", "eval.batches=1", "eval.pictures=0")
    (point,) = learning_curve.run(options, tmp_path / "run")
    assert point["step"] == 0 and 0 < point["minutes"] < 5
    # Of bits about which nothing is known yet.
    assert 0.6 < point["loss"] < 1 and 0.3 < point["bit_accuracy"] < 0.7
    with pytest.raises(UserError, match="failed: error: train.steps is -1: expected"):
        learning_curve.run(("train.steps=-1",), tmp_path / "other")


def test_the_plot_has_a_curve_for_each_row(tmp_path):
    pytest.importorskip("matplotlib")
    rows = {"now": [{"minutes": m, "loss": 0.3 - m / 50} for m in range(1, 4)]}
    learning_curve.plot(rows, tmp_path / "plot.png")
    colours = Image.open(tmp_path / "plot.png").convert("RGB").getcolors(1 << 20)
    first = sum(count for count, colour in colours if colour == (31, 119, 180))
    assert first > 100
