import json
import subprocess
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import binary_sampling, faults, input_pipeline, published_size, train
from benchmarks import sampling as benchmark
from configs import t2i_diffusion
from instella_jax.errors import UserError
from instella_jax.sampling import loops
from tests.paths import ROOT


def test_the_sampler_that_recomputes_the_text_samples_the_same():
    size = dict(num_layers=2, num_heads=2, head_dim=4, bits=5, text_width=6)
    text, mask = benchmark.prompts(size, 2, 3)
    assert text.shape == (2, 4, 3, 6) and mask.sum(1).tolist() == [3, 3, 0, 0]
    network = benchmark.DiffusionTransformer(num_tokens=4, **size)
    params = jax.tree.map(
        lambda x: x + 0.3 * jax.random.normal(jax.random.key(x.size), x.shape),
        benchmark.random_params(network),
    )
    keys = loops.image_keys(jnp.arange(2))
    once, again = (
        np.asarray(loops.sample_diffusion(n, params, text, mask, keys, steps=3))
        for n in (network, benchmark.Recomputing(num_tokens=4, **size))
    )
    np.testing.assert_array_equal(once, again)


def test_one_key_at_a_time_is_varied():
    config = t2i_diffusion.get_config()
    rows = [name for name, _ in train.variations(config, ["unroll", "remat", "attention"])]
    assert rows == [
        "", "run.unroll=False", "run.remat=dots", "run.remat=full", "run.remat=offload",
        "run.attention=xla", "run.attention=blocks", "run.attention=cudnn", "run.attention=flash",
    ]  # fmt: skip
    with pytest.raises(UserError, match="--vary has 'rope': expected some of"):
        train.variations(config, ["rope"])


@pytest.mark.slow
def test_the_step_is_timed_without_any_file():
    command = [sys.executable, "-m", "benchmarks.train", "--config=tests/tiny_diffusion.py"]
    options = ["--config.tokenizer=", "--config.text.encoder=", "--config.data.kind=codes"]
    size = ["--config.run.cpu_devices=1", "--steps=3", "--synthetic", "--one"]
    done = subprocess.run(
        [*command, *options, *size], capture_output=True, text=True, check=True, cwd=ROOT
    )
    result = json.loads(done.stdout.splitlines()[-1])
    assert 0 < result["least"] <= result["median"] <= result["most"]
    assert result["images_per_second"] == pytest.approx(8 / result["median"])
    assert result["tokens_per_second"] == pytest.approx(4 * 8 / result["median"])
    assert result["compile_seconds"] > 0 and result["peak_memory"] > 1e8


@pytest.fixture
def refused(monkeypatch, capsys):
    """Runs a benchmark that refuses, and returns its last line on standard error."""

    def call(module, *arguments):
        monkeypatch.setattr(sys, "argv", [module.__name__, *arguments])
        with pytest.raises(SystemExit) as stop:
            module.main()
        out, err = capsys.readouterr()
        assert stop.value.code == 2 and out == "" and "Traceback" not in err
        return err.splitlines()[-1]

    return call


@pytest.mark.parametrize(
    ("module", "argument", "sentence"),
    [
        (input_pipeline, "--side=0", "argument --side: '0': expected a whole number of at least 1"),
        (input_pipeline, "--source-side=11", "'11': expected a whole number of at least 12"),
        (input_pipeline, "--workers=0,x", "'x': expected a whole number of at least 0"),
        (input_pipeline, "--workers=", "'': expected a whole number of at least 0"),
        (input_pipeline, "--seconds=0", "'0': expected seconds, more than 0"),
        (input_pipeline, "--seconds=long", "'long': expected seconds, more than 0"),
        (input_pipeline, "--tokenizer=/nope", "error: no model at /nope: cannot read"),
        (input_pipeline, "--json=/nope/a.json", "error: --json=/nope/a.json cannot be written"),
        (benchmark, "--repeats=0", "argument --repeats: '0': expected a whole"),
        (binary_sampling, "--bits=-1", "argument --bits: '-1': expected a whole"),
        (faults, "--kills=many", "argument --kills: 'many': expected a whole"),
        (published_size, "--steps=0", "argument --steps: '0': expected a whole"),
    ],
)
def test_what_cannot_be_measured_is_refused_at_once(refused, module, argument, sentence):
    assert sentence in refused(module, argument)


@pytest.mark.parametrize("module", [benchmark, binary_sampling])
def test_without_the_device_nothing_is_measured(refused, monkeypatch, module):
    def fail():
        raise AssertionError

    monkeypatch.setattr(jax, "devices", fail)
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    assert refused(module).startswith("error: JAX_PLATFORMS=cuda, but jax starts no such backend")


def test_a_run_that_fails_without_a_fault_is_told(refused, monkeypatch):
    monkeypatch.setattr(faults.Runs, "run", lambda *_: (2, "", "WARNING: a\nerror: no room\n"))
    assert refused(faults) == "error: a run fails without any fault: no room"


def test_a_step_that_fails_ends_the_others(monkeypatch, tmp_path, capfd):
    """The missing model is told by the process of the step."""
    (tmp_path / "source").mkdir()
    monkeypatch.setattr(sys, "argv", ["published_size", str(tmp_path)])
    with pytest.raises(SystemExit) as stop:
        published_size.main()
    assert stop.value.code == 2
    (sentence,) = capfd.readouterr().err.splitlines()
    assert sentence.startswith("error: ") and str(tmp_path / "source") in sentence


def test_some_rows_suffice_and_none_is_an_error(monkeypatch, capsys):
    """The second of two rows, then neither, can be measured."""
    result = dict.fromkeys(
        ("median", "least", "most", "data_wait", "compile_seconds", "images_per_second",
         "tokens_per_second", "model_tflops_per_device", "peak_memory"), 1.0,
    )  # fmt: skip
    good = SimpleNamespace(returncode=0, stdout=json.dumps({"where": "here", **result}), stderr="")
    bad = SimpleNamespace(returncode=2, stdout="", stderr="error: no model\n")
    config = t2i_diffusion.get_config()
    for name, value in (("CONFIG", config), ("VARY", ["unroll"]), ("STEPS", 1), ("ONE", False)):
        monkeypatch.setattr(train, f"_{name}", SimpleNamespace(value=value))
    for answers, measured in (([bad, good], True), ([bad, bad], False)):
        monkeypatch.setattr(subprocess, "run", lambda *_, a=answers, **__: a.pop(0))
        if measured:
            train.run([])
        else:
            with pytest.raises(UserError, match="nothing was measured"):
                train.run([])
        out = capsys.readouterr().out
        assert "| as configured | not measured: error: no model |" in out
        assert ("| run.unroll=False | 1000.0 |" in out) == measured


@pytest.mark.slow
def test_a_config_that_cannot_be_measured_is_an_error():
    """Started as a user does; the model is missing, or no call is asked for."""

    def run(module, *options):
        command = [sys.executable, "-m", f"benchmarks.{module}", "--config=tests/tiny_diffusion.py"]
        done = subprocess.run(
            [*command, *options], capture_output=True, text=True, check=False, cwd=ROOT
        )
        assert done.returncode == 2
        return done.stdout, done.stderr

    out, err = run("train", "--config.tokenizer=/nope", "--config.run.cpu_devices=1")
    assert out.startswith("| as configured | not measured: error: no model at /nope")
    assert err == "error: nothing was measured, for the reasons above\n"
    out, err = run("train_parts", "--repeats=0")
    assert (out, err) == ("", "error: --repeats is 0: expected at least 1\n")


@pytest.mark.thorough
@pytest.mark.parametrize("codes", ["", "demo"])
def test_the_parts_of_a_step_with_several_draws_are_timed(codes):
    command = [sys.executable, "-m", "benchmarks.train_parts", "--config=configs/t2i_diffusion.py"]
    small = ["--config.train.batch_size=2", "--config.run.cpu_devices=1", "--repeats=1"]
    done = subprocess.run(
        [*command, *small, "--config.loss.draws=3", f"--config.data.scenes.codes={codes}"],
        capture_output=True, text=True, check=False, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = [line.rsplit(maxsplit=3) for line in done.stdout.splitlines() if " ms " in line]
    parts = {name.strip(): float(ms) for name, ms, _, _ in rows}
    assert parts.pop("data + step") > 0
    whole = parts.pop("sum")
    assert len(parts) == (5 if codes else 6) and ("image encoder" in parts) is not bool(codes)
    assert whole == pytest.approx(sum(parts.values()), abs=0.5)


@pytest.mark.parametrize(
    ("steps", "per_call", "timed"), [(1, 10, 2), (10, 10, 2), (20, 10, 2), (21, 10, 3), (40, 1, 40)]
)
def test_two_whole_calls_are_timed_at_least(steps, per_call, timed):
    assert train.number_of_calls(steps, per_call) == timed + 1
