"""Parity at other sizes than those of the published system's vectors.

`reference.py` computes what docs/model.md says in plain numpy. It is held to the published vectors
itself, then makes folders of the same form at other sizes, on which test_parity.py is run.
"""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from instella_jax.models.ar_transformer import ArTransformer
from instella_jax.models.diffusion_transformer import DiffusionTransformer
from instella_jax.models.olmo import Olmo
from instella_jax.models.tokenizer import TokenizerNetwork
from instella_jax.weights import convert, reference_sizes
from tests import reference
from tests.paths import ROOT

VECTORS = ROOT / "tests/data/parity"

BAE = dict(
    encoder_layers=4, encoder_head_dim=8, encoder_num_heads=3, patch_size=2, num_latent_tkns=5,
    axes_dims_rope=[2, 4, 2], downsample_idx=[0, 2], decoder_layers=3, decoder_head_dim=8,
    decoder_num_heads=2, upsample_idx=[0, 1], codebook_size=7,
)  # fmt: skip
TEXT = dict(
    vocab_size=32, hidden_size=24, intermediate_size=20, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, clip_qkv=0.1, rope_theta=500.0,
)  # fmt: skip
SAMPLES = [
    dict(kind="diffusion", protocol="protocal_1", steps=3, guidance=2.0, temp=0.7, rho=2.0),
    dict(kind="diffusion", protocol="protocal_2", steps=5, guidance=1.0, temp=1.0, rho=0.5),
    dict(kind="ar", guidance=4.0, temp=0.9),
]


def meta(bae, sizes):
    """Description of a folder; sizes are (height, width, scale, what is wrong with them)."""
    return {
        "bae": {**BAE, **bae},
        "generator": dict(
            num_layers=3, attention_head_dim=8, num_attention_heads=3, text_cond_dim=10
        ),
        "text": TEXT,
        "tokenizer_cases": [
            dict(height=h, width=w, scale=s, decode_error=error) for h, w, s, error in sizes
        ],
        "samples": [{**case, "key": f"case{i}"} for i, case in enumerate(SAMPLES)],
    }


TWO_LEVELS = meta({}, [(24, 16, 21, None), (16, 16, None, None)])
UNEVEN = meta(
    {"downsample_idx": [], "encoder_layers": 1, "upsample_idx": [2]},
    [(10, 6, 32, "odd grid"), (12, 4, 32, None)],
)


def weights(network, rng):
    shapes = {**convert.reference_shapes(network), **convert.unused_shapes(network)}
    # Large enough that every part of the network matters, all positive scales included.
    return {
        name: (rng.normal(size=shape) * (0.5 if len(shape) < 2 else 0.2)).astype(np.float32)
        for name, shape in shapes.items()
    }


def store(path, values, w):
    arrays = {**values, **{f"weights.{name}": value for name, value in w.items()}}
    save_file(
        {
            name: np.ascontiguousarray(x if x.dtype == np.int64 else x.astype(np.float32))
            for name, x in arrays.items()
        },
        path,
    )


def texts(rng, meta, batch, length=4):
    layers, width = meta["generator"]["num_layers"], meta["generator"]["text_cond_dim"]
    return rng.normal(size=(layers, batch, length, width)).astype(np.float32)


def named(text):
    return {f"text.{i}": x for i, x in enumerate(text)}


def double(w):
    return {name: value.astype(np.float64) for name, value in w.items()}


def write_tokenizer(folder, meta, rng):
    bae, values = meta["bae"], {}
    network = TokenizerNetwork(reference_sizes.tokenizer_sizes(bae))
    w = weights(network, rng)
    for i, case in enumerate(meta["tokenizer_cases"]):
        size, scale = (case["height"], case["width"]), case["scale"]
        image = rng.uniform(-1, 1, (2, 3, *size)).astype(np.float32)
        logits = reference.encode(double(w), bae, scale, image)
        p = reference.sigmoid(logits)
        code = (p > 0.5).astype(np.float64)
        found = dict(
            image=image, logits=logits, code=code, code_loss=np.array([(p - p * p).mean()])
        )
        if case["decode_error"] is None:
            found["decoded"] = reference.decode(double(w), bae, scale, code, *size)
        values |= {f"case{i}.{name}": value for name, value in found.items()}
    store(folder / "tokenizer.safetensors", values, w)


def write_olmo(folder, meta, rng):
    w = weights(Olmo(reference_sizes.olmo_config(meta["text"])), rng)
    ids = rng.integers(0, meta["text"]["vocab_size"], (3, 5))
    mask = np.array([[1] * 5, [0, 0, 1, 1, 1], [0] * 5])
    states = reference.olmo(double(w), meta["text"], ids, mask)
    values = {f"hidden_states.{i}": x for i, x in enumerate(states)}
    w["lm_head.weight"] = w["model.embed_tokens.weight"]
    store(folder / "olmo.safetensors", {**values, "input_ids": ids, "attention_mask": mask}, w)


def write_generators(folder, meta, rng):
    sizes = meta["generator"]
    ours = reference_sizes.generator_sizes(sizes, meta["bae"])
    shape = (2, ours["num_tokens"], ours["bits"])
    text, mask = texts(rng, meta, 2), np.array([[0, 0, 1, 1], [0] * 4])
    z, target = ((rng.uniform(size=shape) < 0.5).astype(np.float64) for _ in range(2))

    def loss(logits, bits):
        return np.array([np.mean(np.logaddexp(0, logits) - bits * logits)])

    w = weights(DiffusionTransformer(**ours), rng)
    t = np.array([0.3, 1.0])
    flip = reference.diffusion(double(w), sizes, z, t, text, mask)
    logits = np.where(z > 0, -flip, flip)
    correct = np.array([100 * np.mean((logits > 0) == (target > 0))])
    values = dict(z_t=z, target=target, t=t, flip_logits=flip, text_mask=mask)
    values |= dict(loss=loss(logits, target), bit_accuracy_percent=correct)
    store(folder / "diffusion.safetensors", {**values, **named(text)}, w)

    w_ar = weights(ArTransformer(**ours), rng)
    logits = reference.ar(double(w_ar), sizes, z[:, :-1], text, mask)
    first = reference.ar(double(w_ar), sizes, z[:, :0], text, mask)
    values = dict(z=z, logits=logits, first_logits=first, loss=loss(logits, z), text_mask=mask)
    store(folder / "ar.safetensors", {**values, **named(text)}, w_ar)

    text, mask = texts(rng, meta, 4), np.array([[1] * 4, [0, 1, 1, 1], [0] * 4, [0] * 4])
    values = {**named(text), "text_mask": mask}
    for case in meta["samples"]:
        if case["kind"] == "ar":
            uniforms = rng.uniform(size=shape).astype(np.float32)
            probs, final = reference.sample_ar(
                lambda z: reference.ar(double(w_ar), sizes, z, text, mask), uniforms, case
            )
            found = dict(probs=probs, final=final)
        else:
            uniforms = rng.uniform(size=(case["steps"], *shape)).astype(np.float32)
            zs, probs, final = reference.sample_diffusion(
                lambda z, t: reference.diffusion(double(w), sizes, z, t, text, mask),
                uniforms, case,
            )  # fmt: skip
            found = dict(z=zs, probs=probs, final=final)
        values |= {f"{case['key']}.{name}": x for name, x in found.items()}
        values[f"{case['key']}.uniforms"] = uniforms
    store(folder / "samples.safetensors", values, {})


@pytest.mark.slow
@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param(TWO_LEVELS, id="two_levels", marks=pytest.mark.thorough),
        pytest.param(UNEVEN, id="uneven"),
    ],
)
def test_parity_at_other_sizes(tmp_path, sizes):
    rng = np.random.default_rng(0)
    (tmp_path / "meta.json").write_text(json.dumps(sizes))
    write_tokenizer(tmp_path, sizes, rng)
    write_olmo(tmp_path, sizes, rng)
    write_generators(tmp_path, sizes, rng)
    # The generators' sizes are the same in both folders.
    chosen = [] if sizes is TWO_LEVELS else ["-k", "test_tokenizer"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-n", "0", ROOT / "tests/test_parity.py", *chosen],
        env={**os.environ, "PARITY_DIR": str(tmp_path)},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]


def vectors(name):
    values = load_file(VECTORS / f"{name}.safetensors")
    w = {k.removeprefix("weights."): v for k, v in values.items() if k.startswith("weights.")}
    return values, double(w)


def close(ours, theirs):
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_reference_is_held_to_the_published_vectors():
    sizes = json.loads((VECTORS / "meta.json").read_text())
    values, w = vectors("tokenizer")
    for i, case in enumerate(sizes["tokenizer_cases"]):
        image, scale = values[f"case{i}.image"], case["scale"]
        close(reference.encode(w, sizes["bae"], scale, image), values[f"case{i}.logits"])
        size = case["height"], case["width"]
        decoded = reference.decode(w, sizes["bae"], scale, values[f"case{i}.code"], *size)
        close(decoded, values[f"case{i}.decoded"])
    values, w = vectors("olmo")
    states = reference.olmo(w, sizes["text"], values["input_ids"], values["attention_mask"])
    for i, state in enumerate(states):
        close(state, values[f"hidden_states.{i}"])
    values, w = vectors("diffusion")
    text = [values["text.0"], values["text.1"]]
    inputs = (values["z_t"], values["t"], text, values["text_mask"])
    close(reference.diffusion(w, sizes["generator"], *inputs), values["flip_logits"])
    values, w = vectors("ar")
    text = [values["text.0"], values["text.1"]]
    inputs = (values["z"][:, :-1], text, values["text_mask"])
    close(reference.ar(w, sizes["generator"], *inputs), values["logits"])
