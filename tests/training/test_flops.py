"""FLOP formulas against published figures and against XLA's own count."""

import dataclasses
import importlib

import jax
import jax.numpy as jnp
import pytest

from instella_jax.models.ar_transformer import ArTransformer
from instella_jax.models.diffusion_transformer import DiffusionTransformer
from instella_jax.models.functional import abstract_params, apply
from instella_jax.models.layers import Execution
from instella_jax.models.olmo import Olmo, OlmoConfig
from instella_jax.models.tokenizer import TokenizerNetwork
from instella_jax.models.tokenizer_config import TokenizerConfig
from instella_jax.runtime.sharding import values
from instella_jax.training import flops

PUBLISHED = dict(num_layers=16, num_heads=16, head_dim=128, num_tokens=128, bits=64)
RUN = Execution(unroll=True)


def counted(network, *inputs, method=None):
    """XLA's count of a forward pass, from shapes alone."""
    params = values(abstract_params(network))
    lowered = jax.jit(lambda p, *x: apply(network, p, *x, method=method)).lower(params, *inputs)
    return lowered.cost_analysis()["flops"]


def floats(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def test_published_generator_and_text_encoder():
    forward = flops.diffusion_forward(PUBLISHED, 2048, 128)
    assert forward == pytest.approx(263e9, rel=2e-3)
    assert 3 * forward == pytest.approx(0.79e12, rel=5e-3)
    assert flops.olmo_forward(OlmoConfig(), 128) == pytest.approx(0.28e12, rel=0.015)


def test_published_speed_is_the_published_utilisation():
    config = importlib.import_module("configs.t2i_diffusion").get_config("instella_512")
    parts = flops.training(config)
    peak = flops.CHIPS["MI300X"].tflops * 1e12
    assert 220 * parts["generator"] / peak == pytest.approx(0.13, abs=0.005)
    with_text = parts["generator"] + parts["text encoder"]
    assert 220 * with_text / peak == pytest.approx(0.18, abs=0.005)


# XLA also counts element-wise work, a few per cent at these widths.
SLACK = 0.08


@pytest.mark.parametrize("kind", ["diffusion", "ar"])
def test_generators_against_xla(kind):
    sizes = dict(num_layers=2, num_heads=4, head_dim=64, num_tokens=32, bits=16)
    text, mask = floats(2, 1, 24, 192), jax.ShapeDtypeStruct((1, 24), jnp.bool_)
    if kind == "diffusion":
        network = DiffusionTransformer(**sizes, text_width=192, run=RUN)
        got = counted(network, floats(1, 32, 16), floats(1), text, mask)
        formula = flops.diffusion_forward(sizes, 192, 24)
    else:
        network = ArTransformer(**sizes, text_width=192, run=RUN)
        got = counted(network, floats(1, 31, 16), text, mask)
        formula = flops.ar_forward(sizes, 192, 24)
    assert formula <= got <= (1 + SLACK) * formula


def test_olmo_against_xla():
    sizes = OlmoConfig(100, 256, 512, 2, 4, 2)
    ids = jax.ShapeDtypeStruct((1, 32), jnp.int32)
    formula = flops.olmo_forward(sizes, 32)
    assert formula <= counted(Olmo(sizes, RUN), ids, ids) <= (1 + SLACK) * formula


def unread(rows, tokens, width):
    """What an unrolled last block does not compute of `tokens`, since nobody reads these rows."""
    return 28 * rows * width**2 + 4 * rows * tokens * width


@pytest.mark.parametrize("levels", [(), (1,)])
def test_tokenizer_against_xla(levels):
    sizes = TokenizerConfig(
        patch_size=8, num_tokens=16, bits=24, encoder_layers=3, encoder_heads=4,
        encoder_head_dim=64, decoder_layers=3, decoder_heads=6, decoder_head_dim=64,
        downsample_after=levels, upsample_after=levels,
    )  # fmt: skip
    network = TokenizerNetwork(sizes, RUN)
    patches = 8 * 12 // 4 ** len(levels)
    encoder = flops.encoder_forward(sizes, 64, 96) - unread(patches, 16 + patches, 256)
    got = counted(network, floats(1, 64, 96, 3), method="encode")
    assert encoder <= got <= (1 + SLACK) * encoder
    params = values(abstract_params(network))
    decode = jax.jit(lambda p, code: apply(network, p, code, 64, 96, method="decode"))
    got = decode.lower(params, floats(1, 16, 24)).cost_analysis()["flops"]
    decoder = flops.decoder_forward(sizes, 64, 96) - unread(16, 16 + 96, 384)
    assert decoder <= got <= (1 + SLACK) * decoder


def test_what_is_frozen_counts_once_and_codes_leave_the_encoder_out():
    module = importlib.import_module("configs.t2i_ar")
    frozen, trained = module.get_config("instella_512"), module.get_config("instella_512")
    trained.text.trainable = True
    once, thrice = flops.training(frozen), flops.training(trained)
    assert thrice["text encoder"] == 3 * once["text encoder"]
    assert thrice["generator"] == once["generator"]
    assert "image encoder" in once
    frozen.data.kind = "codes"
    assert set(flops.training(frozen)) == {"generator", "text encoder"}


def test_draws_repeat_the_image_and_not_the_text():
    config = importlib.import_module("configs.t2i_diffusion").get_config("instella_512")
    once = flops.training(config)
    config.loss.draws = 3
    thrice = flops.training(config)
    assert {**thrice, "generator": 0} == {**once, "generator": 0}
    # Text features to the width, and keys and values of them: 128 rows in 16 blocks.
    text = 3 * 16 * 128 * 2 * 3 * 2048**2
    assert thrice["generator"] == 3 * once["generator"] - 2 * text


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("AMD Instinct MI300X", "MI300X"),
        ("TPU v5p", "v5p"),
        ("TPU v5 lite", "v5e"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("gfx950", "MI355X"),
        ("TPU7x", "v7x"),
        ("TPU v6 lite", "v6e"),
        ("cpu", None),
    ],
)
def test_chips_by_device_kind(kind, name):
    chip = flops.find_chip(kind)
    assert (chip.name if chip else None) == name
    assert all(dataclasses.astuple(c) for c in flops.CHIPS.values())


def test_a_chip_without_a_known_peak_is_said_once(caplog):
    flops.find_chip.cache_clear()
    for _ in range(2):
        assert flops.find_chip("NVIDIA GeForce RTX 9090") is None
    assert flops.find_chip("cpu") is None
    (record,) = caplog.records
    assert "the peak of NVIDIA GeForce RTX 9090 is not known" in record.getMessage()


def test_speed_of_the_published_run():
    config = importlib.import_module("configs.t2i_diffusion").get_config("instella_512")
    config.data.kind = "codes"
    per_image = sum(flops.training(config).values())
    metrics = flops.speed(8 * 220, per_image, "AMD Instinct MI300X", 8)
    assert metrics["images_per_second_per_device"] == 220
    assert metrics["model_flops_utilisation"] == pytest.approx(0.18, abs=0.005)
    assert metrics["model_tflops_per_device"] == pytest.approx(235, abs=1)
    assert "model_flops_utilisation" not in flops.speed(10, per_image, "cpu", 1)


def test_peaks_are_those_of_the_makers_for_dense_bfloat16():
    makers = {
        "MI300X": (1307, 192), "H100": (989, 80), "v5p": (459, 95), "v6e": (918, 32),
        "H200": (989, 141), "B200": (2250, 180), "A100": (312, 80), "L40S": (362, 48),
        "MI325X": (1307, 256), "MI355X": (2517, 288), "v5e": (197, 16),
        "v7x": (2307 // 2, 192 // 2),  # of half a chip
    }  # fmt: skip
    found = {name: (chip.tflops, chip.memory_gb) for name, chip in flops.CHIPS.items()}
    assert found == makers
