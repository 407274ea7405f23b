"""The published system's own outputs for small random weights.

tests/data/parity/README.md says how to read them, PARITY_DIR names another folder of the same form.
"""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from instella_jax.errors import UserError
from instella_jax.models import binary_diffusion
from instella_jax.models.ar_transformer import ArTransformer
from instella_jax.models.diffusion_transformer import DiffusionTransformer
from instella_jax.models.olmo import Olmo
from instella_jax.models.quantizers import code_loss, hard_code
from instella_jax.models.tokenizer import TokenizerNetwork
from instella_jax.sampling import loops
from instella_jax.weights import reference_sizes
from tests.paths import PARITY
from tests.reference_params import to_params

FOLDER = PARITY
META = json.loads((FOLDER / "meta.json").read_text())
SAMPLES = META["samples"]
TOKENIZER_CASES = list(enumerate(META["tokenizer_cases"]))
PROTOCOLS = {"protocal_1": 1, "protocal_2": 2}

pytestmark = pytest.mark.accelerator


@pytest.fixture(autouse=True)
def exact_products():
    with jax.default_matmul_precision("highest"):
        yield


@functools.cache
def tensors(name):
    return load_file(FOLDER / f"{name}.safetensors")


def numbered(values, prefix):
    """Stacks prefix.0, prefix.1, ..."""
    count = sum(name.startswith(f"{prefix}.") for name in values)
    return np.stack([values[f"{prefix}.{i}"] for i in range(count)])


@functools.cache
def load(network, name):
    weights = {
        key.removeprefix("weights."): value
        for key, value in tensors(name).items()
        if key.startswith("weights.")
    }
    return {"params": to_params(network, weights)}


def close(ours, theirs):
    np.testing.assert_allclose(np.asarray(ours), theirs, rtol=1e-4, atol=1e-5)


def generator(kind):
    sizes = reference_sizes.generator_sizes(META["generator"], META["bae"])
    return kind(**sizes)


@pytest.mark.parametrize(("number", "case"), TOKENIZER_CASES)
def test_tokenizer(number, case):
    network = TokenizerNetwork(reference_sizes.tokenizer_sizes(META["bae"], case["scale"]))
    variables = load(network, "tokenizer")
    expected = {
        key.removeprefix(f"case{number}."): value
        for key, value in tensors("tokenizer").items()
        if key.startswith(f"case{number}.")
    }
    apply = jax.jit(network.apply, static_argnums=(2, 3), static_argnames=("method",))
    if "image" in expected:
        images = expected["image"].transpose(0, 2, 3, 1)
        logits = apply(variables, images, method="encode")
        close(logits, expected["logits"])
        np.testing.assert_array_equal(hard_code(logits), expected["code"])
        close(code_loss(logits), expected["code_loss"][0])
    size = case["height"], case["width"]
    if case["decode_error"] is None:
        decoded = apply(variables, expected["code"], *size, method="decode")
        close(decoded.transpose(0, 3, 1, 2), expected["decoded"])
    else:
        code = jnp.zeros((1, network.config.num_tokens, network.config.bits))
        with pytest.raises(UserError, match="multiples of"):
            apply(variables, expected.get("code", code), *size, method="decode")


def test_diffusion():
    network, values = generator(DiffusionTransformer), tensors("diffusion")
    variables = load(network, "diffusion")
    z, target = jnp.asarray(values["z_t"]), jnp.asarray(values["target"])
    apply = jax.jit(network.apply)
    flip = apply(variables, z, values["t"], numbered(values, "text"), values["text_mask"])
    close(flip, values["flip_logits"])
    logits = binary_diffusion.clean_logits(flip, z)
    close(binary_diffusion.loss(logits, target), values["loss"][0])
    close(100 * binary_diffusion.bit_accuracy(logits, target), values["bit_accuracy_percent"][0])


def test_olmo():
    network = Olmo(reference_sizes.olmo_config(META["text"]))
    values = tensors("olmo")
    variables = load(network, "olmo")
    states = jax.jit(network.apply)(variables, values["input_ids"], values["attention_mask"])
    expected = numbered(values, "hidden_states")
    assert states.shape == expected.shape
    close(states, expected)


def test_ar():
    network, values = generator(ArTransformer), tensors("ar")
    variables = load(network, "ar")
    text, z = numbered(values, "text"), jnp.asarray(values["z"])
    apply = jax.jit(network.apply)
    logits = apply(variables, z[:, :-1], text, values["text_mask"])
    close(logits, values["logits"])
    close(binary_diffusion.loss(logits, z), values["loss"][0])
    close(apply(variables, z[:, :0], text, values["text_mask"]), values["first_logits"])


def sample_case(case):
    """The values of a case of samples, the stacked text, its mask, and keys that do not matter."""
    values = tensors("samples")
    own = {
        key.removeprefix(f"{case['key']}."): value
        for key, value in values.items()
        if key.startswith(f"{case['key']}.")
    }
    keys = loops.image_keys(jnp.arange(own["final"].shape[0]))
    text, mask = jnp.asarray(numbered(values, "text")), jnp.asarray(values["text_mask"])
    return own, text, mask, keys


def of_kind(kind):
    return pytest.mark.parametrize(
        "case", [c for c in SAMPLES if c["kind"] == kind], ids=lambda c: c["key"]
    )


@of_kind("diffusion")
def test_diffusion_samples(case):
    network = generator(DiffusionTransformer)
    variables = load(network, "diffusion")
    own, text, mask, keys = sample_case(case)
    bits = loops.sample_diffusion(
        network,
        variables["params"],
        text,
        mask,
        keys,
        steps=case["steps"],
        guidance=case["guidance"],
        temperature=case["temp"],
        rho=case["rho"],
        protocol=PROTOCOLS[case["protocol"]],
        uniforms=own["uniforms"],
    )
    np.testing.assert_array_equal(bits, own["final"])


@of_kind("diffusion")
def test_diffusion_sample_probabilities(case):
    network = generator(DiffusionTransformer)
    variables = load(network, "diffusion")
    own, text, mask, _ = sample_case(case)
    apply = jax.jit(network.apply)
    for i, z in enumerate(own["z"]):
        np.testing.assert_array_equal(z, own["uniforms"][i] < own["probs"][i])
        t, t_next = (
            binary_diffusion.time_of_step(j, case["steps"], case["rho"]) for j in (i, i + 1)
        )
        both = np.concatenate([z, z])
        flip = apply(variables, both, jnp.full(len(both), t), text, mask)
        flip = binary_diffusion.guided(*jnp.split(flip, 2), case["guidance"], case["temp"])
        clean, following = binary_diffusion.step_probability(
            flip, jnp.asarray(z), t, t_next, PROTOCOLS[case["protocol"]]
        )
        if i + 1 < case["steps"]:
            close(following, own["probs"][i + 1])
        else:
            np.testing.assert_array_equal(clean > 0.5, own["final"])


@of_kind("ar")
def test_ar_samples(case):
    network = generator(ArTransformer)
    variables = load(network, "ar")
    own, text, mask, keys = sample_case(case)
    bits = loops.sample_ar(
        network,
        variables["params"],
        text,
        mask,
        keys,
        guidance=case["guidance"],
        temperature=case["temp"],
        uniforms=own["uniforms"],
    )
    np.testing.assert_array_equal(bits, own["final"])
    both = np.concatenate([own["final"]] * 2)[:, :-1]
    logits = jax.jit(network.apply)(variables, both, text, mask)
    guided = binary_diffusion.guided(*jnp.split(logits, 2), case["guidance"], case["temp"])
    close(jax.nn.sigmoid(guided), own["probs"])
