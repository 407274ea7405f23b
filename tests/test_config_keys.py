"""Ranges of all keys: what is nonsense is refused at the start, by the name of its key."""

import importlib
import math
import os
import shutil
import subprocess
import sys
import zipfile
from typing import get_args

import pytest

from instella_jax.commands import evaluate, generate, keys
from instella_jax.config_keys import KEYS, check_values, flat
from instella_jax.data import sources
from instella_jax.data.scenes.maker import PLACES
from instella_jax.errors import UserError
from instella_jax.kernels import binary_sampling
from instella_jax.models import attention, binary_diffusion
from instella_jax.models.layers import REMAT_POLICIES
from instella_jax.planning import plan
from instella_jax.sampling.options import Options
from instella_jax.training import flops, loop
from instella_jax.user_paths import expand
from tests.paths import ROOT
from tests.test_configs import CONFIGS, VARIANTS, get_config, leaves

# Values that no key of these sections takes, whatever the table says.
NONSENSE = {
    "loss.caption_dropout": (2.0, -0.1), "data.folder.heldout": (1.5, 1.0, 0.0, -0.1),
    "data.shards.heldout": (1.5, 0.6, 0.0), "data.codes.heldout": (0.7, 0.0),
    "data.folder.flip": (1.5,), "data.shards.flip": (2.0,), "data.folder.min_keep": (0.0, 1.2),
    "data.shards.min_keep": (0.0, 1.2), "optimizer.b1": (1.5, 1.0), "optimizer.b2": (1.0, 2.0),
    "optimizer.eps": (0.0,), "optimizer.muon.momentum": (1.0,), "optimizer.muon.ns_steps": (0,),
    "optimizer.final_fraction": (1.5,), "train.ema_decay": (1.0, 1.5), "train.batch_size": (0,),
    "train.accumulate": (0,), "train.steps_per_call": (0,), "train.log_every": (0,),
    "train.keep": (0,), "train.max_skipped": (0,), "eval.batch_size": (0,), "eval.batches": (0,),
    "mesh.data": (0, -2), "mesh.fsdp": (0, -2), "mesh.tensor": (0, -2),
    "data.scenes.max_objects": (0, 4), "plan.devices": (0,), "plan.utilisation": (0.0, 1.5),
    "loss.temperature.start": (0.0,), "loss.temperature.end": (0.0,),
    "loss.temperature.steps": (0,), "sample.steps": (0, 5_000), "sample.rho": (0.0, 1e4),
    "sample.protocol": (0, 3), "sample.batch_size": (0,), "sample.images_per_prompt": (0,),
    "sample.height": (100_000,), "model.bits": (0,), "model.num_tokens": (0,),
    "text.max_length": (0,), "text.model.vocab_size": (0,), "train.steps": (2**31,),
    "stage": ("gan",), "run.remat": ("all",), "optimizer.schedule": ("linear",),
    "optimizer.kind": ("sgd",), "data.kind": ("web",), "data.scenes.places": ("moon",),
    "run.dtype": ("float31",), "run.param_dtype": ("int32",), "run.output_dtype": ("",),
    "run.attention": ("fast",), "loss.target": ("v",), "loss.times": ("cosine",),
    "loss.draws": (0,), "loss.time_shift": (0.0, -1.0),
    "sample.kernel": ("triton",), "plan.chip": ("M1",), "model.rope_axes": ((8, 28), (8, 28, -8)),
    "model.downsample_after": ((-1,),),
}  # fmt: skip


def refused(config, name, value):
    """Checks that a value of a key is refused, and named."""
    with config.ignore_type():
        config.update_from_flattened_dict({name: value})
    with pytest.raises(UserError) as error:
        check_values(config)
    found = dict(flat(config))[name]  # an int may have become a float
    assert str(error.value).startswith(f"{name} is {found!r}: expected ")


@pytest.mark.parametrize("name", CONFIGS)
def test_every_key_has_an_entry_and_its_values_are_taken(name):
    for variant in VARIANTS:
        config = get_config(name, variant)
        assert set(leaves(config)) <= set(KEYS)
        check_values(config)


def test_every_entry_is_a_key():
    assert set(KEYS) == {key for name in CONFIGS for key in leaves(get_config(name))}
    assert set(NONSENSE) <= set(KEYS)
    assert all(key.meaning and key.expected for key in KEYS.values())


@pytest.mark.parametrize("name", CONFIGS)
def test_nonsense_is_refused_by_the_name_of_its_key(name):
    tried = 0
    for key, value in flat(get_config(name)):
        bad = list(NONSENSE.get(key, ()))
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if number:
            bad += [math.nan, math.inf, -math.inf, "1", None, -3, -1e30]
            if key not in ("mesh.data", "mesh.fsdp", "mesh.tensor"):
                bad.append(-1)
            if key == "model.scale":
                bad.remove(None)
            if KEYS[key].kind is int:
                bad += [1.5, 2**40, True]
        elif isinstance(value, bool):
            bad += [1, "yes", None]
        elif isinstance(value, str):
            bad += [1, None, True]
        for one in bad:
            refused(get_config(name), key, one)
            tried += 1
    assert tried > 400


@pytest.mark.parametrize("name", CONFIGS)
def test_just_outside_of_a_range_is_refused_and_just_inside_is_not(name):
    for name_of, _ in flat(get_config(name)):
        key = KEYS[name_of]
        if not key.numeric or key.many or key.choices:
            continue
        assert key.low is not None, f"{name_of} may be anything"
        step = 1 if key.kind is int else 1e-9
        for edge, open_, away in ((key.low, key.above, -1), (key.high, key.below, 1)):
            if edge is None:
                continue
            edge = key.kind(edge)
            assert key.takes(edge) == (not open_), name_of
            assert key.takes(edge - away * step), name_of
            if edge + away * step not in key.also:
                refused(get_config(name), name_of, edge + away * step)


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("train.ema_decay", 1.5, "train.ema_decay is 1.5: expected 0 or more, below 1"),
        ("loss.caption_dropout", 2.0, "loss.caption_dropout is 2.0: expected 0 to 1"),
        ("eval.pictures", -1, "eval.pictures is -1: expected 0 to 4,096"),
        ("mesh.data", 0, "mesh.data is 0: expected -1, or at least 1"),
        ("optimizer.eps", 0.0, "optimizer.eps is 0.0: expected more than 0"),
        ("run.unroll", 1, "run.unroll is 1: expected True or False"),
        ("sample.protocol", 3, "sample.protocol is 3: expected one of 1, 2"),
    ],
)
def test_the_sentence_says_what_was_expected(key, value, sentence):
    config = get_config("t2i_diffusion")
    with config.ignore_type():
        config.update_from_flattened_dict({key: value})
    with pytest.raises(UserError) as error:
        check_values(config)
    assert str(error.value) == sentence


def test_choices_are_those_that_the_code_knows():
    for name, known in {
        "data.kind": sources.KINDS, "data.scenes.places": PLACES, "run.remat": REMAT_POLICIES,
        "sample.kernel": binary_sampling.NAMES, "sample.protocol": binary_diffusion.PROTOCOLS,
        "loss.target": get_args(binary_diffusion.Target), "plan.chip": flops.CHIPS,
        "run.attention": (*attention.NAMES, ""),
        "loss.times": binary_diffusion.TIME_DISTRIBUTIONS,
    }.items():  # fmt: skip
        assert set(KEYS[name].choices) == set(known), name


def test_options_of_the_pipeline_have_the_same_ranges():
    with pytest.raises(UserError, match="^steps is 5000: expected 1 to 1,000$"):
        Options(steps=5_000)
    with pytest.raises(UserError, match="^guidance is nan: expected 0 to 1,000$"):
        Options(guidance=math.nan)


def everything_begins_with_the_check(tmp_path):
    yield lambda config: loop.train(config, tmp_path)
    yield lambda config: evaluate.evaluate_config(config, None)
    yield lambda config: generate.generate(config, None)
    yield plan.make_plan


def test_training_evaluation_sampling_and_planning_begin_with_the_check(
    tiny_diffusion_config, tmp_path
):
    config = tiny_diffusion_config
    config.mesh.update(data=-1)
    config.train.ema_decay = 1.5
    for begin in everything_begins_with_the_check(tmp_path / "run"):
        with pytest.raises(UserError, match="train.ema_decay is 1.5"):
            begin(config)
    assert not (tmp_path / "run").exists()


def test_the_command_line_refuses_before_anything_is_made(tmp_path):
    command = [sys.executable, "-m", "instella_jax.main", "--config=configs/t2i_ar.py"]
    command += ["--config.optimizer.b1=1.5", f"--workdir={tmp_path / 'run'}"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 2
    assert done.stderr == "error: optimizer.b1 is 1.5: expected 0 or more, below 1\n"
    assert not (tmp_path / "run").exists()


def test_a_tilde_is_the_home_folder_in_every_path(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert expand("~/a, ~/b,/c/~d") == f"{tmp_path}/a, {tmp_path}/b,/c/~d"
    found = 0
    for name in CONFIGS:
        for key, _ in flat(get_config(name)):
            if KEYS[key].path:
                config = get_config(name)
                config.update_from_flattened_dict({key: "~/x"})
                check_values(config.lock())
                assert dict(flat(config))[key] == f"{tmp_path}/x"
                found += 1
    assert found > 15


def test_the_document_is_up_to_date():
    written = (ROOT / "docs" / "config.md").read_text(encoding="utf-8")
    assert written == keys.document(), "run: instella-jax keys > docs/config.md"


def test_the_keys_of_a_config_are_printed_with_their_values(capsys):
    keys.main("t2i_diffusion:instella_512")
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("| `data.image_size` | `512` | 1 to 65,536 |") for line in lines)
    config = importlib.import_module("configs.t2i_diffusion").get_config("instella_512")
    assert sum(line.startswith("| `") for line in lines) == len(list(leaves(config)))


@pytest.mark.thorough
def test_a_wheel_brings_its_configs(tmp_path):
    pytest.importorskip("setuptools", minversion="77", reason="as pyproject.toml asks for")
    source = tmp_path / "source"
    ignored = shutil.ignore_patterns("__pycache__", "build", "*.egg-info", ".git", "runs", "tests")
    shutil.copytree(ROOT, source, ignore=ignored)
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q"]
    subprocess.run([*build, "-w", tmp_path, source], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        assert {f"instella_jax/configs/{name}.py" for name in CONFIGS} <= set(names)
        assert not any(name.startswith("configs/") for name in names)
        archive.extractall(tmp_path / "installed")
    (empty := tmp_path / "empty").mkdir()
    env = {**os.environ, "PYTHONPATH": str(tmp_path / "installed"), "JAX_PLATFORMS": "cpu"}

    def run(*command):
        command = [sys.executable, "-m", *command]
        return subprocess.run(
            command, capture_output=True, text=True, cwd=empty, env=env, check=False
        )

    listed = run("instella_jax", "keys", "t2i_diffusion:instella_512")
    assert "| `data.image_size` | `512` |" in listed.stdout
    missing = run("instella_jax.main", "--config=t2i_diffusion:instella_7")
    assert missing.returncode == 2 and "unknown variant 'instella_7'" in missing.stderr
    planned = run("instella_jax.main", "--config=tokenizer", "--mode=plan", *SMALL)
    assert "Memory of one device:" in planned.stdout, planned.stderr
    assert not list(empty.iterdir())


SMALL = ["--config.plan.devices=1", "--config.train.batch_size=8", "--config.run.unroll=False"]
