"""Adapters beside the kernels: nothing at first, then W + alpha / r * B A, applied or merged."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from instella_jax.errors import UserError
from instella_jax.models import lora
from instella_jax.models.ar_transformer import ArTransformer
from instella_jax.models.diffusion_transformer import DiffusionTransformer
from instella_jax.models.functional import abstract_params, apply, init_params
from instella_jax.models.layers import Execution, unstack
from instella_jax.runtime import sharding
from instella_jax.weights import convert, lora_files

SIZES = dict(num_layers=2, num_heads=2, head_dim=8, num_tokens=4, bits=8, text_width=12)
NETWORKS = {"diffusion": DiffusionTransformer(**SIZES), "ar": ArTransformer(**SIZES)}
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "proj_cond", "net.0.proj", "net.2")
RANK, ALPHA = 3, 5.0


@pytest.fixture(params=list(NETWORKS))
def network(request):
    return NETWORKS[request.param]


def random_like(tree, seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.float32(0.3 * rng.normal(size=x.shape)), tree)


@pytest.fixture
def params(network):
    return random_like(sharding.values(abstract_params(network)), 0)


@pytest.fixture
def adapters(network):
    return lora_files.make_adapters(network, RANK, ALPHA, TARGETS, "float32")


@pytest.fixture
def trained(adapters):
    """Adapters away from their zeros."""
    return random_like(sharding.values(init_params(adapters, jax.random.key(0))), 1)


def inputs(network):
    rng = np.random.default_rng(2)
    z = jnp.float32(rng.integers(0, 2, (3, 4, 8)))
    text = jnp.float32(rng.normal(size=(2, 3, 5, 12)))
    mask = jnp.ones((3, 5), bool)
    if isinstance(network, ArTransformer):
        return z[:, 1:], text, mask
    return z, jnp.linspace(0.1, 0.9, 3), text, mask


def output(network, params):
    """What a network makes of the inputs, compiled as a whole."""
    return jax.jit(lambda params: apply(network, params, *inputs(network)))(params)


def test_new_adapters_change_no_bit_of_the_output(network, params, adapters):
    fresh = sharding.values(init_params(adapters, jax.random.key(0)))
    with_adapters = lora.adapt(params, fresh, adapters.scale)
    assert jax.tree.structure(with_adapters) != jax.tree.structure(params)
    out = output(network, params)
    np.testing.assert_array_equal(output(network, with_adapters), out)


def test_first_values_are_those_of_peft(adapters):
    fresh = sharding.values(init_params(adapters, jax.random.key(0)))
    layer = fresh["blocks"]["mlp"]["down"]
    assert layer["lora_a"].shape == (2, 64, RANK) and layer["lora_b"].shape == (2, RANK, 16)
    # torch's kaiming_uniform_ with a = sqrt(5) is uniform in +-1/sqrt(fan_in).
    assert 0.9 / 8 < np.abs(layer["lora_a"]).max() <= 1 / 8
    assert not layer["lora_b"].any()


def test_merged_is_applied(network, params, adapters, trained):
    applied = lora.adapt(params, trained, adapters.scale)
    merged = lora.merge(applied)
    assert jax.tree.structure(merged) == jax.tree.structure(params)
    base = output(network, params)
    one, other = (output(network, p) for p in (applied, merged))
    assert np.abs(one - base).max() > 0.1
    np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
    unrolled = network.clone(run=Execution(unroll=True))
    np.testing.assert_allclose(output(unrolled, applied), other, rtol=1e-4, atol=1e-5)


def test_the_sampler_of_one_position_applies_them_too():
    network = NETWORKS["ar"]
    made = lora_files.make_adapters(network, RANK, ALPHA, TARGETS, "float32")
    fresh = sharding.values(init_params(made, jax.random.key(0)))
    params = random_like(sharding.values(abstract_params(network)), 0)
    applied = lora.adapt(params, random_like(fresh, 1), made.scale)
    z, text, mask = inputs(network)
    cache = apply(network, applied, text, method="start_cache")
    layers = unstack(applied["blocks"])
    step = jax.jit(lambda *given: apply(network, applied, *given, mask, layers, method="step"))
    previous = jnp.zeros((3, 8))
    for index, wanted in enumerate(output(network, applied).swapaxes(0, 1)):
        one, cache = step(previous, jnp.int32(index), cache)
        np.testing.assert_allclose(one, wanted, rtol=1e-4, atol=1e-4)
        previous = z[:, min(index, 2)]


def test_two_sets_of_adapters_add_up(network, params, adapters, trained):
    other = jax.tree.map(lambda x: 0.7 * x[..., ::-1], trained)
    both = lora.adapt(lora.adapt(params, trained, 0.5), other, 0.25)
    first = lora.merge(lora.adapt(params, trained, 0.5))
    one = lora.merge(lora.adapt(first, other, 0.25))
    np.testing.assert_allclose(
        output(network, both), output(network, one), rtol=1e-4, atol=1e-5
    )  # fmt: skip


def test_the_files_are_pefts_and_say_what_is_merged(network, params, adapters, trained, tmp_path):
    """W + alpha / r * B A on the published tensors, in float64, by the names in the file."""
    lora_files.save(tmp_path, network, adapters, trained, base="demo", step=7, dtype="float32")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", RANK, ALPHA)
    assert lora_files.saved_step(tmp_path) == 7
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    first = "base_model.model.transformer_blocks.1.attn.q_proj"
    assert tensors[f"{first}.lora_A.weight"].shape == (RANK, 16)
    published = dict(convert.from_params(network, params))
    adapted = set()
    for name in tensors:
        module, side = name.removeprefix("base_model.model.").split(".lora_")
        assert side in ("A.weight", "B.weight")
        # As PEFT finds the layers of target_modules.
        assert any(module.endswith(f".{target}") for target in config["target_modules"])
        adapted.add(module)
    assert len(adapted) == 2 * len(TARGETS)
    for module in adapted:
        a, b = (
            np.float64(tensors[f"base_model.model.{module}.lora_{side}.weight"]) for side in "AB"
        )
        published[f"{module}.weight"] = published[f"{module}.weight"] + ALPHA / RANK * b @ a
    merged = lora.merge(lora.adapt(params, trained, adapters.scale))
    for name, value in convert.from_params(network, merged):
        np.testing.assert_allclose(value, published[name], rtol=1e-5, atol=1e-6, err_msg=name)


def test_what_is_saved_is_loaded(network, adapters, trained, tmp_path):
    lora_files.save(tmp_path, network, adapters, trained, base="demo", step=7, dtype="float32")
    loaded, scale = lora_files.load(tmp_path, network)
    assert scale == ALPHA / RANK
    jax.tree.map(np.testing.assert_array_equal, loaded, jax.device_get(trained))
    lora_files.save(tmp_path, network, adapters, trained, base="demo", step=7)
    loaded, _ = lora_files.load(tmp_path, network)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2**-8), loaded, trained)


def test_rank_stabilised_adapters_have_their_own_scale(adapters, trained, tmp_path, network):
    lora_files.save(tmp_path, network, adapters, trained, base="", step=0)
    edit(tmp_path, use_rslora=True)
    assert lora_files.load(tmp_path, network)[1] == pytest.approx(ALPHA / RANK**0.5)


def edit(folder, **values):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (dict(peft_type="IA3"), "is of the kind 'IA3': expected 'LORA'"),
        (dict(use_dora=True), "has use_dora=True, which is not understood here"),
        (dict(bias="lora_only"), "has bias='lora_only'"),
        (dict(fan_in_fan_out=True), "fan_in_fan_out"),
        (dict(lora_bias=True), "lora_bias"),
        (dict(modules_to_save=["proj_out"]), "modules_to_save"),
        (dict(rank_pattern={"q_proj": 4}), "rank_pattern"),
        (dict(alpha_pattern={"q_proj": 4}), "alpha_pattern"),
        (dict(layer_replication=[[0, 1]]), "layer_replication"),
        (dict(trainable_token_indices=[1]), "trainable_token_indices"),
        (dict(target_parameters=["experts.weight"]), "target_parameters"),
        (dict(r=0), "has r=0 and lora_alpha=5.0: expected two numbers"),
        (dict(r=4), r"has shape \[3, 16\], expected \[4, 16\]: the adapters are of another model"),
    ],
)
def test_adapters_that_would_be_read_wrongly_are_refused(change, match, tmp_path):
    network = NETWORKS["diffusion"]
    made = lora_files.make_adapters(network, RANK, ALPHA, ("q_proj",), "float32")
    params = sharding.values(init_params(made, jax.random.key(0)))
    lora_files.save(tmp_path, network, made, params, base="", step=0)
    edit(tmp_path, **change)
    with pytest.raises(UserError, match=match):
        lora_files.load(tmp_path, network)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda t: t.pop(min(t)), "lacks the tensor 'base_model.model.transformer_blocks.0"),
        (lambda t: t.update({"other": np.zeros(2, np.float32)}), "has an unknown tensor 'other'"),
    ],
)
def test_files_that_do_not_fit_are_refused(change, match, tmp_path):
    network = NETWORKS["diffusion"]
    made = lora_files.make_adapters(network, RANK, ALPHA, ("q_proj",), "float32")
    params = sharding.values(init_params(made, jax.random.key(0)))
    lora_files.save(tmp_path, network, made, params, base="", step=0)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(UserError, match=match):
        lora_files.load(tmp_path, network)


def test_no_adapters_in_a_folder(tmp_path):
    with pytest.raises(UserError, match="no adapters at"):
        lora_files.load(tmp_path, NETWORKS["diffusion"])


@pytest.mark.parametrize(
    ("targets", "match"),
    [
        (("q_proj", "qproj"), "lora.targets has 'qproj', which is no layer: expected names such"),
        (("transformer_blocks.1.attn.q_proj",), "of some blocks only: expected .*'attn.q_proj'"),
        ((), "lora.targets is empty"),
    ],
)
def test_names_that_are_no_layers_are_refused(targets, match):
    with pytest.raises(UserError, match=match):
        lora_files.make_adapters(NETWORKS["diffusion"], RANK, ALPHA, targets, "float32")


def test_the_ends_of_a_network_can_be_adapted_too(tmp_path):
    network = NETWORKS["diffusion"]
    made = lora_files.make_adapters(network, RANK, ALPHA, ("proj_out", "norm1.linear"), "float32")
    assert set(made.kernels) == {"bits_out", "blocks/modulation"}
    params = random_like(sharding.values(init_params(made, jax.random.key(0))), 1)
    lora_files.save(tmp_path, network, made, params, base="", step=0, dtype="float32")
    loaded, _ = lora_files.load(tmp_path, network)
    jax.tree.map(np.testing.assert_array_equal, loaded, jax.device_get(params))


def test_a_folder_that_was_cut_off_has_no_step(network, adapters, trained, tmp_path):
    lora_files.save(tmp_path, network, adapters, trained, base="base", step=7)
    assert lora_files.saved_step(tmp_path) == 7
    (tmp_path / lora_files.CONFIG).unlink()
    assert lora_files.saved_step(tmp_path) is None
