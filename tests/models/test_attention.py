"""Engines of attention against a softmax written out in numpy, and where they lower to."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.experimental.pallas import tpu as pltpu

from instella_jax.models import attention
from tests.attention_by_hand import inputs, masks, written_out

SHAPES = {
    "square": (2, 40, 40, 4, 4),
    "joint": (3, 16, 41, 4, 4),
    "shared heads": (2, 24, 24, 4, 2),
    "one query": (1, 1, 7, 2, 2),
}


@pytest.mark.parametrize("kind", ["none", "padding", "causal"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("engine", ["xla", "blocks", "blocks of all heads"])
def test_engines_compute_softmax_attention(engine, shape, kind, monkeypatch):
    if engine == "blocks of all heads":
        monkeypatch.setattr(attention, "platform", lambda: "rocm")
    # Blocks that do not divide the queries.
    monkeypatch.setattr(attention, "CPU_BLOCK", 300)
    monkeypatch.setattr(attention, "DEVICE_BLOCK", 2_500)
    (q, k, v), mask = inputs(*shape), masks(kind, shape[0], shape[1], shape[2])
    name = engine.partition(" ")[0]
    got = jax.jit(attention.attend, static_argnums=4)(q, k, v, mask, name)
    np.testing.assert_allclose(got, written_out(q, k, v, mask), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("kind", ["none", "padding"])
def test_blocks_have_the_gradients_of_the_whole_and_keep_no_matrix(kind, monkeypatch):
    monkeypatch.setattr(attention, "CPU_BLOCK", 512)
    shape = (2, 40, 64, 4, 2)
    arrays, mask = inputs(*shape), masks(kind, 2, 40, 64)
    weights = jax.random.normal(jax.random.key(1), (2, 40, 64))

    def loss(engine):
        return lambda *x: jnp.sum(weights * attention.attend(*x, mask, engine))

    def kept(engine):
        # What the backward pass reads, of the compiled forward pass's outputs.
        shapes = jax.eval_shape(lambda *x: jax.vjp(loss(engine), *x)[1], *arrays)
        return max(x.size for x in jax.tree.leaves(shapes))

    got, wanted = (jax.jit(jax.grad(loss(e), (0, 1, 2)))(*arrays) for e in ("blocks", "xla"))
    for one, other in zip(got, wanted, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=2e-6)
    assert kept("xla") >= 2 * 4 * 40 * 64
    assert kept("blocks") <= 2 * 64 * 4 * 16


@pytest.mark.parametrize("engine", ["xla", "blocks"])
def test_half_precision_sums_in_float32(engine):
    q, k, v = inputs(1, 64, 512, 2, 2, dtype=jnp.bfloat16)
    got = attention.attend(q, k, v, None, engine)
    assert got.dtype == jnp.bfloat16
    exact = written_out(q, k, v, None)
    # Weights and result are rounded to 8 bits, sums are not.
    np.testing.assert_allclose(np.asarray(got, np.float32), exact, rtol=0.02, atol=2e-3)


def test_the_tpu_kernel_computes_softmax_attention():
    q, k, v = inputs(1, 256, 384, 2, 2, dim=64)
    with pltpu.force_tpu_interpret_mode(), jax.default_matmul_precision("highest"):
        got = attention.attend(q, k, v, None, "flash")
    np.testing.assert_allclose(got, written_out(q, k, v, None), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize(
    ("engine", "where"),
    [("xla", "cpu"), ("xla", "cuda"), ("xla", "rocm"), ("xla", "tpu"), ("blocks", "cuda"),
     ("blocks", "rocm"), ("blocks", "tpu"), ("flash", "tpu"), ("cudnn", "cuda")],
)  # fmt: skip
def test_engines_lower_for_their_platforms(engine, where, monkeypatch):
    monkeypatch.setattr(attention, "platform", lambda: where)
    if engine == "cudnn":
        stablehlo = "jax._src.cudnn.fused_attention_stablehlo"
        monkeypatch.setattr(f"{stablehlo}.check_cudnn_version", lambda: 91_000)
        monkeypatch.setattr(f"{stablehlo}.check_compute_capability", lambda *_: True)
    arrays = inputs(2, 1152, 1152, 2, 2, dim=64, dtype=jnp.bfloat16)
    mask = None if engine == "flash" else masks("padding", 2, 1152, 1152)

    def loss(*arrays):
        return attention.attend(*arrays, mask, engine).astype(jnp.float32).sum()

    checks = [export.DisabledSafetyCheck.custom_call(n) for n in ("__cudnn$fmhaScaleBiasSoftmax",
              "__cudnn$fmhaScaleBiasSoftmaxBackward")]  # fmt: skip
    gradient = jax.jit(jax.grad(loss, (0, 1, 2)))
    text = export.export(gradient, platforms=[where], disabled_checks=checks)(*arrays).mlir_module()
    assert ("tpu_custom_call" in text) == (engine == "flash")
    assert ("__cudnn$fmha" in text) == (engine == "cudnn")


@pytest.mark.parametrize(
    ("kind", "version", "capability", "expected"),
    [
        ("cpu", "", None, "cpu"), ("tpu", "", None, "tpu"), ("gpu", "rocm 6.2", "9.4", "rocm"),
        ("gpu", "cuda 12", "9.0", "cuda"), ("gpu", "cuda 12", "8.0", "cuda"),
        ("gpu", "cuda 12", "7.5", "gpu"),
    ],
)  # fmt: skip
def test_platforms_are_told_by_their_devices(monkeypatch, kind, version, capability, expected):
    client = types.SimpleNamespace(platform_version=version)
    device = types.SimpleNamespace(platform=kind, client=client, compute_capability=capability)
    monkeypatch.setattr(jax, "devices", lambda: [device])
    assert attention.platform.__wrapped__() == expected


@pytest.mark.parametrize(
    ("wanted", "name", "where", "dtype", "queries", "keys", "head_dim", "masked"),
    [
        ("xla", "auto", "cpu", "float32", 16, 44, 32, True),
        ("blocks", "auto", "cpu", "float32", 1152, 1152, 64, False),
        ("cudnn", "auto", "cuda", "bfloat16", 128, 256, 128, True),
        ("xla", "auto", "cuda", "bfloat16", 128, 193, 128, True),
        ("xla", "auto", "cuda", "float32", 128, 256, 128, True),
        ("blocks", "auto", "cuda", "float32", 1152, 1152, 64, False),
        ("blocks", "cudnn", "cuda", "bfloat16", 4224, 4224, 256, False),
        ("xla", "auto", "gpu", "float16", 128, 256, 128, True),
        ("blocks", "auto", "rocm", "bfloat16", 1152, 1152, 64, False),
        ("xla", "auto", "rocm", "bfloat16", 128, 256, 128, True),
        ("flash", "auto", "tpu", "bfloat16", 1024, 1152, 64, False),
        ("xla", "auto", "tpu", "bfloat16", 128, 256, 128, True),
        ("blocks", "flash", "tpu", "bfloat16", 1000, 1152, 64, False),
        ("flash", "flash", "tpu", "bfloat16", 128, 256, 64, False),
        ("xla", "xla", "tpu", "bfloat16", 4224, 4224, 64, False),
    ],
)
def test_auto_goes_by_platform_and_shape(
    wanted, name, where, dtype, queries, keys, head_dim, masked
):
    asked = (name, where, dtype, queries, keys, head_dim, masked)
    assert attention.choose(*asked) == wanted


def test_the_choice_is_said_once(caplog):
    attention.choose.cache_clear()
    with caplog.at_level("INFO"):
        for _ in range(2):
            attention.choose("auto", "tpu", "bfloat16", 1024, 1152, 64, False)
    assert [r.message for r in caplog.records] == [
        "attention of 1024 queries to 1152 keys in bfloat16 on tpu: flash (asked for: auto)"
    ]
