"""The networks that ours are timed beside compute what the published ones do."""

import json
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file

from instella_jax.weights import reference_sizes
from tests.needs_torch import HAS_TORCH, needs_torch
from tests.paths import PARITY

if HAS_TORCH:
    import torch

    from benchmarks import plain_torch

META = json.loads((PARITY / "meta.json").read_text())


def tensors(name):
    return {
        key: torch.from_numpy(x) for key, x in load_file(PARITY / f"{name}.safetensors").items()
    }


def weights(values):
    return {k.removeprefix("weights."): x for k, x in values.items() if k.startswith("weights.")}


def layers(values):
    return torch.stack([values[f"text.{i}"] for i in range(META["generator"]["num_layers"])])


def sizes():
    numbers = reference_sizes.generator_sizes(META["generator"], META["bae"])
    numbers.pop("text_width")
    return plain_torch.Generator(**numbers)


def close(ours, theirs):
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


@needs_torch
def test_the_tokenizer_is_the_published_one():
    values = tensors("tokenizer")
    w = weights(values)
    for number, case in enumerate(META["tokenizer_cases"]):
        config = reference_sizes.tokenizer_sizes(META["bae"], case["scale"])
        image, code = values[f"case{number}.image"], values[f"case{number}.code"]
        close(plain_torch.encode(w, config, image), values[f"case{number}.logits"])
        size = case["height"], case["width"]
        close(plain_torch.decode(w, config, code, *size), values[f"case{number}.decoded"])


@needs_torch
def test_the_generators_are_the_published_ones():
    values = tensors("diffusion")
    text, mask = layers(values), values["text_mask"]
    flip = plain_torch.diffusion(weights(values), sizes(), values["z_t"], values["t"], text, mask)
    close(flip, values["flip_logits"])
    values = tensors("ar")
    text, mask = layers(values), values["text_mask"]
    logits = plain_torch.autoregressive(weights(values), sizes(), values["z"][:, :-1], text, mask)
    close(logits, values["logits"])


@needs_torch
@pytest.mark.parametrize("case", META["samples"], ids=lambda case: case["key"])
def test_the_samplers_are_the_published_ones(case):
    values = tensors("samples")
    text, mask, kind = layers(values), values["text_mask"], case["kind"]
    w, uniforms = weights(tensors(kind)), values[f"{case['key']}.uniforms"]
    guidance = dict(guidance=case["guidance"], temperature=case["temp"])
    if kind == "ar":

        def predict(z):
            return plain_torch.autoregressive(w, sizes(), z, text, mask)

        bits = plain_torch.sample_ar(predict, uniforms, **guidance)
    else:

        def denoise(z, t):
            return plain_torch.diffusion(w, sizes(), z, t, text, mask)

        protocol = {"protocal_1": 1, "protocal_2": 2}[case["protocol"]]
        bits = plain_torch.sample_diffusion(
            denoise, uniforms, rho=case["rho"], protocol=protocol, **guidance
        )
    np.testing.assert_array_equal(bits, values[f"{case['key']}.final"])


@needs_torch
@pytest.mark.slow
def test_both_are_compared_before_they_are_timed(tmp_path):
    command = [
        sys.executable, "-m", "benchmarks.against_torch", "--size=tiny", "--side=64", "--steps=3",
        "--repeats=1", f"--json={tmp_path / 'figures.json'}",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr
    results = json.loads((tmp_path / "figures.json").read_text())["results"]
    assert [r["path"] for r in results] == ["encode", "decode", "diffusion", "ar", "train"]
    assert all(r["ratio"] > 0 and r["apart"] < 1e-4 for r in results)


@pytest.mark.skipif(HAS_TORCH, reason="torch is installed")
def test_without_torch_the_extra_is_named():
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.against_torch"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.strip().endswith(
        "no PyTorch to compare with: pip install 'instella-jax[torch]'"
    )
