"""What holds on any chip: `pytest -m accelerator` tries it on the one that is here, and else a CPU.

Tolerances are relative to the largest number of a result, and those of the arithmetic:

- float32 with products in full (`highest`): 1e-4, as sums are taken in another order; without it a
  chip takes products of float32 in TF32 or bfloat16.
- bfloat16, whose numbers have 8 binary digits: 0.01 for one attention, 0.02 for its gradients, 0.05
  for a network and 0.02 for the mean loss of a step.
"""

import contextlib
import importlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from instella_jax.evaluation.scenes import prompts_report
from instella_jax.kernels import binary_sampling
from instella_jax.models import attention, binary_diffusion
from instella_jax.models.ar_transformer import ArTransformer
from instella_jax.models.diffusion_transformer import DiffusionTransformer
from instella_jax.models.functional import apply
from instella_jax.models.layers import Execution
from instella_jax.models.tokenizer import TokenizerNetwork
from instella_jax.runtime import sharding
from instella_jax.sampling import loops
from instella_jax.sampling.load import load_sampler
from instella_jax.stages import make_stage
from instella_jax.stages.parameters import load_frozen, with_target_of_weights
from instella_jax.training.setup import initial_state
from instella_jax.training.step import jit_step
from instella_jax.weights import reference_sizes
from tests.attention_by_hand import gradients, inputs, masks, written_out
from tests.paths import PARITY
from tests.reference_params import to_params

pytestmark = pytest.mark.accelerator

EXACT = 1e-4
META = json.loads((PARITY / "meta.json").read_text())
HALF = Execution(dtype="bfloat16", param_dtype="bfloat16")


def close(ours, wanted, tolerance):
    ours, wanted = (np.asarray(x, np.float64) for x in (ours, wanted))
    assert ours.shape == wanted.shape
    apart = np.abs(ours - wanted).max() / np.abs(wanted).max()
    assert apart <= tolerance, f"{apart:.2g} of the largest number apart"


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("engine", ["auto", "xla", "blocks"])
@pytest.mark.parametrize(
    ("shape", "kind"),
    [((2, 64, 128, 4, 4, 128), "padding"), ((1, 1024, 1152, 2, 2, 64), "none"),
     ((2, 128, 128, 4, 2, 64), "causal")],
    ids=["generator", "tokenizer", "shared heads"],
)  # fmt: skip
def test_attention_and_its_gradients(shape, kind, engine, dtype):
    arrays = inputs(*shape, dtype=jnp.dtype(dtype))
    mask = masks(kind, *shape[:3])
    if mask is not None:  # engines differ in the gradients of a query that sees nothing
        mask = mask.at[..., :1].set(True)
    of_result = jax.random.normal(jax.random.key(1), written_out(*arrays, mask).shape)

    def loss(*arrays):
        out = attention.attend(*arrays, mask, engine)
        return jnp.sum(of_result * out.astype(jnp.float32)), out

    with jax.default_matmul_precision("highest"):
        found, out = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(*arrays)
    exact = dtype == "float32"
    close(out, written_out(*arrays, mask), EXACT if exact else 0.01)
    for ours, wanted in zip(found, gradients(*arrays, mask, of_result), strict=True):
        close(ours, wanted, EXACT if exact else 0.02)


def test_the_unconditional_row_that_sees_no_text_is_finite():
    q, k, v = inputs(2, 64, 128, 4, 4, 128, dtype=jnp.bfloat16)
    mask = jnp.zeros((2, 1, 1, 128), bool)
    out = jax.jit(attention.attend)(q, k, v, mask)
    close(out, written_out(q, k, v, mask), 0.01)


IMAGES = 2


def kernels():
    """How to call this platform's kernel: on a CPU all of them, interpreted."""
    if jax.default_backend() == "cpu":
        return [dict(implementation=name, interpret=True) for name in ("pallas_tpu", "pallas_gpu")]
    return [dict(implementation=binary_sampling.resolve("pallas", jax.default_backend()))]


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_kernels_give_the_bits_of_the_reference(dtype):
    keys = loops.image_keys(jnp.arange(IMAGES))
    logits = 2 * jax.random.normal(jax.random.key(1), (2, IMAGES, 128, 64), dtype)
    z = jax.random.bernoulli(jax.random.key(2), shape=(IMAGES, 128, 64)).astype(dtype)
    settings = (0.7, 0.65, 1.5, 1.0, False)
    for how in kernels():
        for protocol in binary_diffusion.PROTOCOLS:
            call = jax.jit(
                lambda logits, z, keys, p=protocol, how=how: [
                    binary_sampling.diffusion_step(logits, z, keys, 3, *settings, protocol=p, **one)
                    for one in (how, {})
                ]
            )
            ours, wanted = call(logits, z, keys)
            np.testing.assert_array_equal(ours, wanted)
        call = jax.jit(
            lambda logits, keys, how=how: [
                binary_sampling.autoregressive_bits(logits, keys, 3, 1.5, 1.0, **one)
                for one in (how, {})
            ]
        )
        ours, wanted = call(logits[:, :, 0], keys)
        np.testing.assert_array_equal(ours, wanted)


def parity(name):
    return load_file(PARITY / f"{name}.safetensors")


def of_parity(network, values):
    """The weights of a file, in half precision."""
    start = "weights."
    weights = {k.removeprefix(start): x for k, x in values.items() if k.startswith(start)}
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), to_params(network, weights))


def text_of(values):
    layers = range(META["generator"]["num_layers"])
    return jnp.stack([values[f"text.{i}"] for i in layers]), values["text_mask"]


def test_half_precision_is_near_the_published_outputs():
    sizes = reference_sizes.generator_sizes(META["generator"], META["bae"])
    values, network = parity("diffusion"), DiffusionTransformer(**sizes, run=HALF)
    call = jax.jit(lambda p, *x: apply(network, p, *x))
    given = (values["z_t"], values["t"], *text_of(values))
    close(call(of_parity(network, values), *given), values["flip_logits"], 0.05)

    values, network = parity("ar"), ArTransformer(**sizes, run=HALF)
    call = jax.jit(lambda p, *x, network=network: apply(network, p, *x))
    given = (jnp.asarray(values["z"])[:, :-1], *text_of(values))
    close(call(of_parity(network, values), *given), values["logits"], 0.05)

    case, values = META["tokenizer_cases"][0], parity("tokenizer")
    network = TokenizerNetwork(reference_sizes.tokenizer_sizes(META["bae"], case["scale"]), HALF)
    params, size = of_parity(network, values), (case["height"], case["width"])
    encode = jax.jit(lambda p, x: apply(network, p, x, method="encode"))
    image = values["case0.image"].transpose(0, 2, 3, 1)
    close(encode(params, image), values["case0.logits"], 0.05)
    decode = jax.jit(lambda p, x: apply(network, p, x, *size, method="decode"))
    pictures = decode(params, values["case0.code"]).transpose(0, 3, 1, 2)
    close(pictures, values["case0.decoded"], 0.05)


def one_step(config, device):
    """The loss and the parameters after one step on a device."""
    mesh, stage = sharding.make_mesh(config.mesh, [device]), make_stage(config)
    # Initial values are those of the host, whatever a chip makes of the same key.
    host = sharding.make_mesh(config.mesh, jax.devices("cpu")[:1])
    state, optimizer = initial_state(stage, config, host)
    loader = stage.loader("train", batch_size=8, steps_per_call=1)
    with sharding.use(mesh), contextlib.closing(loader):
        state = jax.device_put(state, sharding.replicated(mesh))
        batch = sharding.arrays(next(loader))
        batch = sharding.place(batch, sharding.batch_sharding(mesh, leading=1))
        step = jit_step(stage, optimizer, config, state)
        state, metrics = step(state, load_frozen(stage, mesh), batch)
        return float(metrics["loss"]), jax.device_get(state.params)


@pytest.mark.thorough  # without a chip a CPU is compared with itself
@pytest.mark.parametrize("name", ["tokenizer", "diffusion", "ar"])
def test_one_training_step_is_that_of_a_cpu(name, request):
    config = request.getfixturevalue(f"tiny_{name}_config").copy_and_resolve_references()
    config.optimizer.warmup_steps = 0
    with jax.default_matmul_precision("highest"):
        ours = one_step(config, jax.devices()[0])
        config.run.attention = "xla"
        wanted = one_step(config, jax.devices("cpu")[-1])
    assert abs(ours[0] / wanted[0] - 1) < EXACT
    for one, other in zip(*(jax.tree.leaves(x[1]) for x in (ours, wanted)), strict=True):
        # A step of Adam is at most the learning rate, 1e-4 of what matters.
        np.testing.assert_allclose(one, other, atol=1e-4, rtol=0)
    if name == "ar":  # as diffusion
        return
    config.run.update(dtype="bfloat16", attention="auto")
    half, _ = one_step(config, jax.devices()[0])
    assert abs(half / wanted[0] - 1) < 0.02


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")
@pytest.mark.parametrize(
    ("name", "right"),
    [("diffusion", 0.9), pytest.param("ar", 0.85, marks=pytest.mark.thorough)],
)
def test_the_shipped_weights_sample_what_was_asked_for_in_half_precision(name, right):
    config = importlib.import_module(f"configs.t2i_{name}").get_config()
    config = with_target_of_weights(config)
    config.mesh.update(data=1, fsdp=1, tensor=1)
    config.run.dtype = "bfloat16"
    config.sample.kernel = "auto" if jax.default_backend() == "cpu" else "pallas"
    config.mesh.data = len(jax.devices())
    sampler, _ = load_sampler(config, None)
    found = prompts_report(sampler, config, 16).sampled
    # All 64 prompts in float32: 0.97 and 0.95.
    assert found["objects"] >= right, found
