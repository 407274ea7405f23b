"""Two real processes train generators, draw and evaluate as one does."""

import os
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
from PIL import Image

from instella_jax.runtime import sharding
from instella_jax.stages import make_stage
from instella_jax.stages.base import init_stage
from instella_jax.weights import model_folder
from tests.runtime.test_distributed import ROOT, finish, free_port, losses

PROMPTS = ["a cat on a red background", "two dogs", "a red heart", "a frog", "a bus on the left"]


@pytest.fixture
def model(tiny_diffusion_config, tmp_path):
    """Model folder of a tiny generator whose pictures depend on the prompt."""
    stage = make_stage(tiny_diffusion_config)
    params = sharding.values(jax.jit(lambda key: init_stage(stage, key))(jax.random.key(1)))
    params = jax.tree.map(
        lambda x: x + 0.4 * jax.random.normal(jax.random.key(x.size), x.shape), params
    )
    folder = tmp_path / "model"
    model_folder.save(folder, stage.describe(), params, text_folder=stage.text_folder)
    return folder


def run(processes, stage, *options):
    """Runs a mode in 1 or 2 processes with two devices in all; returns what they printed."""
    port, started = free_port(), []
    for index in range(processes):
        command = [
            sys.executable, "-m", "instella_jax.main", f"--config=tests/tiny_{stage}.py",
            "--config.mesh.data=2", f"--config.run.cpu_devices={2 // processes}", *options,
        ]  # fmt: skip
        if processes > 1:
            command += [
                f"--coordinator_address=127.0.0.1:{port}", f"--num_processes={processes}",
                f"--process_id={index}",
            ]  # fmt: skip
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        environ = {**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
        started.append(subprocess.Popen(command, cwd=ROOT, env=environ, **pipes))
    return finish(started)


@pytest.mark.thorough
def test_two_processes_sample_as_one(model, tiny_tokenizer_folder, tmp_path):
    """Of an autoregressive model on several devices: tests/sampling/test_loops.py."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS), encoding="utf-8")
    options = (
        f"--config.init_from={model}", f"--config.tokenizer={tiny_tokenizer_folder}",
        "--mode=sample", f"--config.sample.prompts_file={prompts}",
        "--config.sample.batch_size=4", "--config.sample.steps=3",
    )  # fmt: skip
    one, two = tmp_path / "one", tmp_path / "two"
    run(1, "diffusion", *options, f"--config.sample.out={one}")
    _, second = run(2, "diffusion", *options, f"--config.sample.out={two}")
    assert "picture(s)" not in second
    names = sorted(path.name for path in one.glob("*.png"))
    assert len(names) == len(PROMPTS) + 1
    assert names == sorted(path.name for path in two.glob("*.png"))
    pictures = [(one / name).read_bytes() for name in names]
    assert pictures == [(two / name).read_bytes() for name in names]


@pytest.mark.thorough
def test_two_processes_train_as_one(tiny_tokenizer_folder, tmp_path):
    options = (
        f"--config.tokenizer={tiny_tokenizer_folder}", "--config.train.steps=3",
        "--config.train.log_every=1", "--config.train.eval_every=0", "--config.eval.pictures=0",
    )  # fmt: skip
    for processes in (1, 2):
        run(processes, "diffusion", *options, f"--workdir={tmp_path / str(processes)}")
    one, two = (losses(tmp_path / str(processes)) for processes in (1, 2))
    assert list(one) == [1, 2, 3] and list(two) == [1, 2, 3]
    np.testing.assert_allclose(list(two.values()), list(one.values()), rtol=1e-5)


@pytest.mark.thorough
def test_two_processes_measure_as_one(model, tiny_tokenizer_folder, tmp_path):
    options = (
        f"--config.init_from={model}", f"--config.tokenizer={tiny_tokenizer_folder}", "--mode=eval",
        f"--config.data.folder.path={tmp_path / 'pictures'}", "--config.data.kind=folder",
        "--config.data.folder.heldout=0.5",
    )  # fmt: skip
    (tmp_path / "pictures").mkdir()
    rng = np.random.default_rng(0)
    for index in range(32):
        pixels = rng.integers(0, 256, (40, 40, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "pictures" / f"{index}.png")
        (tmp_path / "pictures" / f"{index}.txt").write_text("a dog", encoding="utf-8")
    (one,), (first, second) = run(1, "diffusion", *options), run(2, "diffusion", *options)
    assert "loss" not in second

    def loss(printed):
        return float(re.search(r"loss (\S+)", printed)[1])

    assert loss(first) == pytest.approx(loss(one), abs=2e-4)
