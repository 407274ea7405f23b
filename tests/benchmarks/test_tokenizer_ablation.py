"""The ablation of the tokenizer: real runs in a tiny size, and its tables."""

import json
import sys

import pytest

from benchmarks import tokenizer_ablation
from configs import tokenizer
from instella_jax.config_keys import flat

TINY = (
    "--config=tests/tiny_tokenizer.py", "--steps=4", "--pictures=8",
    "--config.model.num_tokens=2", "--config.train.batch_size=8",
    "--config.model.encoder_layers=1", "--config.model.decoder_layers=1",
)  # fmt: skip


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["tokenizer_ablation", *map(str, arguments)])
    tokenizer_ablation.main()


def test_every_row_names_keys_of_the_config_and_differs_from_the_others():
    known = dict(flat(tokenizer.get_config()))
    for _, keys in tokenizer_ablation.ROWS.values():
        assert all(key.split("=")[0] in known for key in (*keys, *tokenizer_ablation.SMALL))
    choices = [keys for _, keys in tokenizer_ablation.ROWS.values()]
    assert len(set(choices)) == len(choices)


def test_a_cell_is_the_mean_of_the_seeds_and_half_of_their_range():
    assert tokenizer_ablation.cell([20.0, 21.0, 22.6], 2) == "21.20 ± 1.30"
    assert tokenizer_ablation.cell([0.5], 3) == "0.500"


@pytest.mark.thorough
def test_rows_are_trained_measured_and_kept(monkeypatch, tmp_path, capsys):
    out = tmp_path / "ablation"
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    run(monkeypatch, "--out", out, "--rows=tail_drop", *TINY)
    first = capsys.readouterr().out
    (made,) = json.loads((out / "ablation.json").read_text())["runs"]
    workdir = out / "tail_drop-seed0"
    config = json.loads((workdir / "config.json").read_text())
    assert config["loss"]["tail_drop"] == 0.5 and config["train"]["steps"] == 4
    # Each number of tokens is what `instella-jax eval` says of it.
    assert [part["tokens"] for part in made["first_tokens"]] == [2, 1]
    assert [part["bits"] for part in made["first_tokens"]] == [32, 16]
    for part, place in zip(made["first_tokens"], ("measured", "first_1"), strict=True):
        report = json.loads((workdir / place / "report.json").read_text())
        assert part["scores"] == report["scores"] and report["tokens"] == part["tokens"]
    assert f"{made['scores']['psnr']:.2f}" in first
    # Again: nothing is run, and the same is said.
    monkeypatch.setattr(tokenizer_ablation, "call", None)
    run(monkeypatch, "--out", out, "--rows=tail_drop", *TINY)
    assert capsys.readouterr().out.splitlines() == first.splitlines()[1:]
    with pytest.raises(SystemExit):
        run(monkeypatch, "--out", out, "--rows=tail_drop", *TINY, "--steps=5")
    assert "had other settings" in capsys.readouterr().err


def test_what_is_not_there_is_refused(monkeypatch, tmp_path, capsys):
    for arguments, sentence in (
        (("--rows=soup",), "--rows has 'soup': expected some of smooth_l1"),
        (("--steps=0",), "expected a whole number of at least 1"),
        (("--soup",), "unknown: --soup"),
    ):
        with pytest.raises(SystemExit) as stop:
            run(monkeypatch, "--out", tmp_path / "out", *arguments)
        assert stop.value.code == 2 and sentence in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
