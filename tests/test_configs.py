"""Every config and variant: sizes by formula, the published recipe, and a reader for each key."""

import ast
import importlib
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from instella_jax import key_types
from instella_jax.commands import generate
from instella_jax.commands.arguments import default_workdir
from instella_jax.config_keys import KEYS, check_values
from instella_jax.data import buckets, sources
from instella_jax.errors import UserError
from instella_jax.models.functional import abstract_params
from instella_jax.runtime import devices, sharding
from instella_jax.sampling import load
from instella_jax.sampling.load import Weights
from instella_jax.stages import make_stage
from instella_jax.stages.base import init_stage
from instella_jax.training import loop
from instella_jax.training.optimizer import make_optimizer
from instella_jax.weights import model_folder
from tests import vision_folders
from tests.paths import ROOT
from tests.toy_stage import Points

CONFIGS = sorted(path.stem for path in (ROOT / "configs").glob("*.py"))
VARIANTS = ("", "instella_512", "instella_768", "instella_1024")
GENERATORS = ("t2i_diffusion", "t2i_ar")
# Published sizes, docs/model.md.
TOKENIZER = dict(
    patch=16, tokens=128, bits=64, encoder=(12, 12, 64), decoder=(16, 16, 64), levels=1
)
DEMO_TOKENIZER = dict(
    patch=16, tokens=16, bits=32, encoder=(2, 4, 48), decoder=(4, 4, 48), levels=0
)
GENERATOR = dict(layers=16, heads=16, head=128, tokens=128, bits=64, text=2048)
DEMO_GENERATOR = dict(layers=4, heads=4, head=32, tokens=16, bits=32, text=64)
OLMO = dict(layers=16, width=2048, hidden=8192, vocabulary=50_304)


def get_config(name, variant=""):
    return importlib.import_module(f"configs.{name}").get_config(variant)


def count(params):
    return sum(int(np.prod(x.shape)) for x in jax.tree.leaves(sharding.values(params)))


def linear(fan_in, fan_out):
    """Numbers in a linear layer with bias."""
    return fan_in * fan_out + fan_out


def tokenizer_count(patch, tokens, bits, encoder, decoder, levels):
    """Numbers in the tokenizer, by docs/model.md."""

    def blocks(layers, heads, head):
        d = heads * head
        return layers * (4 * d * d + 2 * head + 3 * d * 4 * d + 2 * d)

    d, e = encoder[1] * encoder[2], decoder[1] * decoder[2]
    pixels = 3 * patch * patch
    down, up = levels * linear(9 * d, d), levels * linear(9 * e, 4 * e)
    encoding = linear(pixels, d) + tokens * d + blocks(*encoder) + down + d + linear(d, d)
    decoding = d + linear(d, e) + e + blocks(*decoder) + up + e + linear(e, pixels)
    return encoding + linear(d, bits) + bits * d + decoding


def diffusion_count(layers, heads, head, tokens, bits, text):
    """Numbers in the diffusion generator, by docs/model.md."""
    d = heads * head
    attention = linear(text, d) + 4 * d * d + 2 * head
    feed_forward = linear(d, 4 * d) + linear(4 * d, d)
    block = linear(d, 6 * d) + tokens * d + attention + feed_forward
    time = linear(1, d) + linear(d, d)
    return linear(bits, d) + time + layers * block + linear(d, 2 * d) + linear(d, bits)


def ar_count(layers, heads, head, tokens, bits, text):
    """Numbers in the autoregressive generator, by docs/model.md."""
    d = heads * head
    attention = linear(text, d) + 4 * d * d + 2 * head
    feed_forward = linear(d, 4 * d) + linear(4 * d, d)
    block = attention + feed_forward + 2 * d
    positions = layers * (tokens + 1) * d
    return d + linear(bits, d) + positions + layers * block + d + linear(d, bits)


def olmo_count(layers, width, hidden, vocabulary):
    """Numbers in the language model, by docs/model.md: tied embedding, plain norms."""
    return vocabulary * width + layers * (4 * width * width + 3 * width * hidden)


COUNTS = {"t2i_diffusion": diffusion_count, "t2i_ar": ar_count}


def test_every_config_has_the_same_variants():
    assert CONFIGS == ["t2i_ar", "t2i_diffusion", "tokenizer"]
    for name in CONFIGS:
        for variant in VARIANTS:
            assert isinstance(get_config(name, variant), ConfigDict)
        with pytest.raises(UserError, match="unknown variant 'x': expected none .the demo., inst"):
            get_config(name, "x")


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_tokenizer_has_the_sizes_of_the_spec(variant):
    stage = make_stage(get_config("tokenizer", variant))
    params = jax.eval_shape(lambda key: init_stage(stage, key), jax.random.key(0))
    wanted = tokenizer_count(**(TOKENIZER if variant else DEMO_TOKENIZER))
    assert count(params) == pytest.approx(wanted, rel=0.01)
    if variant:
        assert count(params) == pytest.approx(0.4e9, rel=0.1)


@pytest.mark.parametrize(("side", "bits"), [(128, 2_048), (256, 8_192)])
def test_the_variants_for_photographs_learn_by_all_losses(side, bits):
    config = get_config("tokenizer", f"photographs_{side}")
    check_values(config)
    stage = make_stage(config)
    assert stage.sizes.num_tokens * stage.sizes.bits == bits
    assert set(stage.networks) == {"tokenizer", "discriminator"}
    assert set(stage.frozen_networks) == {"lpips"}
    assert config.loss.adversarial.start + config.loss.adversarial.warmup < config.train.steps
    assert config.loss.temperature.steps <= config.train.steps


@pytest.mark.parametrize("variant", [*VARIANTS, "photographs_128", "photographs_256"])
@pytest.mark.parametrize("recipe", ["stage2", "finetune", "finetune_decoder"])
def test_recipes_begin_with_the_model_of_the_variant_s_run(variant, recipe):
    config, plain = get_config("tokenizer", f"{variant}+{recipe}"), get_config("tokenizer", variant)
    check_values(config)
    assert config.model == plain.model
    argument = f"configs/tokenizer.py:{variant}" if variant else "configs/tokenizer.py"
    assert config.init_from == f"{default_workdir(argument)}/model"
    stage, side = make_stage(config), plain.data.image_size
    assert stage.freeze_encoder == (recipe != "finetune")
    if recipe != "stage2":
        assert config.loss.perceptual.weight == (plain.loss.perceptual.weight or 1.0)
    if recipe == "stage2":
        sides = [(n, n) for n in (2 * side, side * 3 // 2, side)]
        assert list(buckets.shapes(config)) == (sides if variant else [(side, side)])
    else:
        assert set(stage.networks) == {"tokenizer"} and set(stage.frozen_networks) == {"lpips"}
        assert config.train.steps == 2_000


def test_a_recipe_that_there_is_not_is_named():
    with pytest.raises(UserError, match=r"unknown variant \+stage3: expected one of \+stage2, "):
        get_config("tokenizer", "instella_512+stage3")


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", GENERATORS)
def test_generators_have_the_sizes_of_the_spec(name, variant):
    config = get_config(name, variant)
    stage = make_stage(config)
    params = jax.eval_shape(lambda key: init_stage(stage, key), jax.random.key(0))
    wanted = COUNTS[name](**(GENERATOR if variant else DEMO_GENERATOR))
    assert count(params["generator"]) == pytest.approx(wanted, rel=0.01)
    if variant and name == "t2i_diffusion":
        assert wanted == pytest.approx(1.3e9, rel=0.02)
    assert set(params) == {"generator"}


def test_the_text_encoder_has_the_sizes_of_olmo_1b():
    stage = make_stage(get_config("t2i_diffusion", "instella_512"))
    params = abstract_params(stage.text_network)
    assert count(params) == pytest.approx(olmo_count(**OLMO), rel=0.01)
    assert count(params) == pytest.approx(1.18e9, rel=0.01)


@pytest.mark.parametrize("variant", VARIANTS[1:])
@pytest.mark.parametrize("name", GENERATORS)
def test_the_published_recipe_of_the_generators(name, variant):
    c = get_config(name, variant)
    size = int(variant.removeprefix("instella_"))
    assert c.data.image_size == size and c.data.kind == "folder"
    o = c.optimizer
    assert (o.learning_rate, o.eps, o.weight_decay, o.clip) == (1e-4, 1e-8, 0.0, 1.0)
    assert (o.warmup_steps, o.schedule) == (1000, "constant")
    assert (c.train.batch_size, c.train.save_every, c.train.keep) == (4096, 2500, 10)
    assert c.run.dtype == "bfloat16" and c.run.remat != "none"
    assert c.loss.caption_dropout == 0.1
    assert (c.text.max_length, c.text.trainable) == (128, False)
    for kind in ("folder", "shards"):
        # The published 0.5 mirrors pictures whose captions say left and right.
        assert (c.data[kind].min_keep, c.data[kind].flip) == (0.8, 0.0)
    if name == "t2i_diffusion":
        assert (c.loss.target, c.loss.times) == ("epsilon", "logit_normal")
        assert (c.sample.steps, c.sample.guidance) == (20, 7.5)
    else:
        assert (c.sample.guidance, c.sample.temperature) == (9.0, 0.5)


def leaves(config, prefix=""):
    """Names of all values, with dots."""
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key


def sections(config, prefix=""):
    """Each ConfigDict inside a config by its name with a dot at the end."""
    yield prefix, config
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            yield from sections(value, f"{prefix}{key}.")


def shapes_only(function, **_):
    """Stands in for jax.jit: traces, computes nothing, returns zeros."""

    def zeros(x):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.random.key(0)
        return jnp.zeros(x.shape, x.dtype)

    return lambda *args: jax.tree.map(zeros, jax.eval_shape(function, *args))


def record_reads(config, monkeypatch):
    """Returns a set that the names of values enter as they are read."""
    read, original = set(), ConfigDict.__getitem__
    names = {id(section): prefix for prefix, section in list(sections(config))}

    def getitem(self, key):
        if id(self) in names:
            read.add(names[id(self)] + key)
        return original(self, key)

    monkeypatch.setattr(ConfigDict, "__getitem__", getitem)
    return read


def pretend_to_train(config, workdir, monkeypatch):
    """Runs the whole loop without compiling a program."""
    one = dict(data=1, fsdp=1, tensor=1)
    mesh = sharding.make_mesh(one, jax.devices()[:1])
    with monkeypatch.context() as patch:
        patch.setattr(jax, "jit", shapes_only)
        patch.setattr(loop._Run, "compile_ahead", lambda run: None)
        patch.setattr(sharding, "make_mesh", lambda sizes: [sizes[a] for a in one] and mesh)
        loop.train(config, workdir)


def pretend_to_draw(config, monkeypatch):
    """Reads prompts and options as --mode=sample does."""
    with monkeypatch.context() as patch:
        samples = SimpleNamespace(images=np.zeros((1, 8, 8, 3), np.uint8))
        blank = SimpleNamespace(
            batches=lambda *_, **__: [samples],
            batch_size=lambda count, options: count,
            text_length=lambda texts: 1,
            size=lambda options: (8, 8),
            kind="diffusion",
            generator=SimpleNamespace(run=SimpleNamespace(dtype="float32")),
        )
        patch.setattr(load, "load_sampler", lambda *_: (blank, Weights("nothing", None, {})))
        generate.generate(config, None)


def pretend_to_start(config, monkeypatch):
    """Chooses devices as main does."""
    with monkeypatch.context() as patch:
        patch.setattr(jax.config, "update", lambda *_: None)
        devices.start(config)


def read_all_kinds_of_data(config, folder, monkeypatch):
    """Opens every kind of data, shards and codes replaced by points."""
    from PIL import Image

    from instella_jax.data import codes, shards

    for name in "ab":
        Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text("black")
    with monkeypatch.context() as patch, config.unlocked():
        patch.setattr(shards, "ImageShards", lambda *_, **__: Points())
        patch.setattr(codes, "CodeShards", lambda *_, **__: Points())
        for kind in sources.KINDS:
            config.data.kind = kind
            if "path" in config.data[kind]:
                config.data[kind].path = str(folder)
            sources.make_split(config.data, "train", captions=True, batch_size=1).close()


def names_read(pattern, variable):
    """Attributes of a variable that the package's files of a pattern read."""
    return {
        node.attr
        for path in (ROOT / "instella_jax").glob(pattern)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == variable
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_every_key_has_a_reader(name, tmp_path, monkeypatch, tiny_tokenizer_folder):
    config = get_config(name)
    config.train.update(steps=20, eval_every=10, save_every=10, image_every=10)
    config.eval.update(pictures=0, batches=1)
    if name in GENERATORS:
        config.tokenizer = str(tiny_tokenizer_folder)
        config.data.image_size = 32
        config.model.update(num_tokens=4, bits=8)
        config.sample.update(prompt="a heart", out=str(tmp_path))
    else:
        # A loss of weight 0 reads nothing else.
        terms = ["code", "entropy", "balance", "perceptual", "adversarial", "features", "alignment"]
        for loss in terms:
            config.loss[loss].weight = 1.0
        vision_folders.write(tmp_path / "dinov2")
        config.loss.update(vision=str(tmp_path / "dinov2"), adversarial=dict(heads=3))
    # Keys that nobody reads: the test must find them.
    config.dead = config.train.dead = 0
    for key in ("dead", "train.dead"):
        monkeypatch.setitem(KEYS, key, key_types.whole("nothing", 0))
    keys = set(leaves(config))
    read = record_reads(config, monkeypatch)
    pretend_to_train(config, tmp_path / "run", monkeypatch)
    pretend_to_start(config, monkeypatch)
    if name in GENERATORS:
        pretend_to_draw(config, monkeypatch)
        config.lora.rank = 2
        make_stage(config)
    else:
        config.loss.adversarial.kind = "features"
        assert make_stage(config).networks
    read_all_kinds_of_data(config, tmp_path, monkeypatch)
    for kind in KEYS["optimizer.kind"].choices:
        config.optimizer.kind = kind
        make_optimizer(config.optimizer, steps=20)
    for folder in ("", "folder"):
        config.init_from = folder
        model_folder.find_weights(config)
    read |= {f"plan.{key}" for key in names_read("planning/*.py", "wanted")}
    assert keys - read == {"dead", "train.dead"}


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"attention": "cudnn", "dtype": "bfloat16"}, "needs an NVIDIA GPU .*, and this is cpu"),
        ({"attention": "flash"}, "flash needs a TPU, and this is cpu"),
        ({"attention": "cudnn"}, "does not compute in float32"),
    ],
)
@pytest.mark.parametrize("name", ["tokenizer", "t2i_ar"])
def test_a_way_to_compute_that_there_is_not_is_named(name, keys, message):
    config = get_config(name)
    config.run.update(keys)
    with pytest.raises(UserError, match=message):
        make_stage(config)
