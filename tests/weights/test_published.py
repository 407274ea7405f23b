"""Import and export of the published layout, from the published system's own tensor names."""

import json
import pickle
import shutil
import subprocess
import sys
import types
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, models

import configs.t2i_ar
import configs.t2i_diffusion
from instella_jax.errors import UserError
from instella_jax.models.layers import Execution
from instella_jax.models.text import TextTokenizer
from instella_jax.models.tokenizer import TokenizerNetwork
from instella_jax.models.tokenizer_config import TokenizerConfig
from instella_jax.runtime import sharding
from instella_jax.sampling.options import Options
from instella_jax.sampling.sampler import Sampler
from instella_jax.stages import make_stage, parameters
from instella_jax.weights import convert, model_folder, model_parts, reference_sizes
from instella_jax.weights.export import export_model
from instella_jax.weights.published import import_model, inspect, open_any
from instella_jax.weights.tensor_files import write_safetensors
from tests.needs_torch import HAS_TORCH, needs_torch
from tests.paths import ROOT
from tools import make_random_published

VECTORS = ROOT / "tests/data/parity"
META = json.loads((VECTORS / "meta.json").read_text())
BAE = "model/bae/model.safetensors"
OLMO = "olmo/model.safetensors"


def weights(name):
    return {
        key.removeprefix("weights."): value.astype(jnp.bfloat16)
        for key, value in load_file(VECTORS / f"{name}.safetensors").items()
        if key.startswith("weights.")
    }


@pytest.fixture(scope="session")
def original(tmp_path_factory):
    """The published layout with the weights of the vectors; generators as safetensors."""
    root = tmp_path_factory.mktemp("published")
    for path, name in {
        BAE: "tokenizer",
        "model/diffusion.safetensors": "diffusion",
        "model/ar.safetensors": "ar",
        OLMO: "olmo",
    }.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        save_file(weights(name), root / path)
    (root / "olmo/config.json").write_text(json.dumps(META["text"]))
    words = {word: number for number, word in enumerate(["<|endoftext|>", "<|padding|>", "a"])}
    Tokenizer(models.WordLevel(words)).save(str(root / "olmo/tokenizer.json"))
    return root


@pytest.fixture
def source(original, tmp_path):
    """A copy of it to damage."""
    return Path(shutil.copytree(original, tmp_path / "source"))


@pytest.fixture(scope="session")
def model(original, tmp_path_factory):
    """The model folder that it becomes."""
    out = tmp_path_factory.mktemp("imported") / "model"
    import_model(original / "model", original / "olmo", out, META)
    return out


def refused(source, match, sizes=META):
    """Checks that an import fails with one sentence and leaves nothing."""
    out = source.parent / "made/on/the/way/model"
    before = sorted(source.parent.iterdir())
    with pytest.raises(UserError, match=match) as error:
        import_model(source / "model", source / "olmo", out, sizes)
    assert "\n" not in str(error.value)
    assert sorted(source.parent.iterdir()) == before


def change(path, name, function):
    tensors = load_file(path)
    value = function(tensors.pop(name))
    save_file(tensors if value is None else {**tensors, name: value}, path)


def same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert ours[name].dtype == value.dtype and ours[name].shape == value.shape
        assert ours[name].tobytes() == value.tobytes(), name


def test_sizes_are_those_of_the_published_system(model):
    description = model_folder.read_description(model)
    tokenizer, text = description["tokenizer"], description["text"]
    assert tokenizer["patch_size"] == META["bae"]["patch_size"]
    assert tokenizer["decoder_heads"] == META["bae"]["decoder_num_heads"]
    assert tokenizer["rope_axes"] == META["bae"]["axes_dims_rope"]
    assert (tokenizer["num_tokens"], tokenizer["bits"]) == (8, 10)
    assert tokenizer["scale"] == 1024
    assert description["ar"] == {
        "kind": "ar", "num_layers": 2, "num_heads": 2, "head_dim": 16, "num_tokens": 8, "bits": 10,
    }  # fmt: skip
    assert description["diffusion"] == {**description["ar"], "kind": "diffusion"}
    assert (text["hidden_size"], text["max_length"], text["pad_token_id"]) == (24, 128, 1)


def test_tensors_keep_type_and_bits(model):
    stored = load_file(model / "ar.safetensors")
    ours = stored["blocks/attention/q/kernel"]
    assert ours.dtype == jnp.bfloat16
    theirs = weights("ar")
    for layer in range(2):
        name = f"transformer_blocks.{layer}.attn.q_proj.weight"
        np.testing.assert_array_equal(ours[layer], theirs[name].T)
    unused = {k: v for k, v in theirs.items() if k.startswith("time_embed")}
    same(load_file(model / "ar_unused.safetensors"), unused)


@needs_torch
@pytest.mark.parametrize("head", [True, False])
def test_there_and_back_is_identical(source, tmp_path, head):
    from instella_jax.weights.torch_files import write_torch

    if not head:
        change(source / OLMO, "lm_head.weight", lambda x: None)
        change(source / "model/ar.safetensors", "time_embed.linear_1.bias", lambda x: None)
    (source / "olmo/tokenizer_config.json").write_text('{"pad_token": "a"}')
    published = {}
    for kind in ("diffusion", "ar"):
        path = source / f"model/{kind}.safetensors"
        published[kind] = load_file(path)
        path.unlink()
        write_torch(path.with_suffix(".pt"), published[kind].items())
    import_model(source / "model", source / "olmo", tmp_path / "model", META)
    export_model(tmp_path / "model", "reference", tmp_path / "back")
    for kind, theirs in published.items():
        with open_any(tmp_path / "back" / f"{kind}.pt") as tensors:
            same(dict(tensors), theirs)
    same(load_file(tmp_path / "back/bae/model.safetensors"), load_file(source / BAE))
    same(load_file(tmp_path / "back/text_encoder/model.safetensors"), load_file(source / OLMO))
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        back, theirs = (
            json.loads((folder / name).read_text())
            for folder in (tmp_path / "back/text_encoder", source / "olmo")
        )
        assert back == theirs


def test_settings_of_the_text_tokenizer_come_along(source, tmp_path):
    settings = source / "olmo/tokenizer_config.json"
    settings.write_text(json.dumps({"pad_token": "a", "padding_side": "right"}))
    import_model(source / "model", source / "olmo", tmp_path / "model", META)
    export_model(tmp_path / "model", "orbax", tmp_path / "orbax")
    for folder in (tmp_path / "model", tmp_path / "orbax"):
        assert (folder / settings.name).read_bytes() == settings.read_bytes()
        assert TextTokenizer.from_folder(folder).pad_id == 2
    description = json.loads((tmp_path / "model/config.json").read_text())
    assert description["text"]["pad_token_id"] == 2


def test_orbax_and_safetensors_are_model_folders_too(model, tmp_path):
    export_model(model, "orbax", tmp_path / "orbax")
    assert not (tmp_path / "orbax/diffusion.safetensors").exists()
    export_model(tmp_path / "orbax", "safetensors", tmp_path / "again")
    for path in model.iterdir():
        if path.suffix == ".safetensors":
            same(load_file(tmp_path / "again" / path.name), load_file(path))
        else:
            assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()
    shutil.rmtree(tmp_path / "orbax/ar/d")
    with pytest.raises(UserError, match="ar is damaged"):
        export_model(tmp_path / "orbax", "safetensors", tmp_path / "never")
    assert not (tmp_path / "never").exists()


def stage_config(module, folder):
    config = module.get_config()
    config.model.update(num_layers=2, num_heads=2, head_dim=16, num_tokens=8, bits=10)
    config.text.update(encoder=str(folder), trainable=False)
    config.text.model.update(
        vocab_size=64, hidden_size=24, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2,
    )  # fmt: skip
    config.update(tokenizer=str(folder), init_from=str(folder))
    config.data.image_size = 128
    if config.stage == "diffusion":
        config.loss.target = "epsilon"
    return config


@pytest.mark.parametrize("module", [configs.t2i_ar, configs.t2i_diffusion])
def test_training_starts_from_it(model, tmp_path, module):
    export_model(model, "orbax", tmp_path / "orbax")
    for folder in (model, tmp_path / "orbax"):
        config = stage_config(module, folder)
        stage, mesh = make_stage(config), sharding.make_mesh(config.mesh)
        params = parameters.load_trained(stage, config, mesh)
        stored = load_file(model / f"{stage.kind}.safetensors")
        assert params["generator"]["bits_in"]["kernel"].dtype == jnp.float32
        same(
            model_folder.flatten(params["generator"]),
            {name: value.astype(np.float32) for name, value in stored.items()},
        )
        assert set(parameters.load_frozen(stage, mesh)) == {"tokenizer", "text"}


def test_a_generator_that_predicts_something_else_is_refused(model):
    config = stage_config(configs.t2i_diffusion, model)
    config.loss.target = "x"
    message = "predicts 'epsilon', config.loss.target is 'x'"
    with pytest.raises(UserError, match=message):
        parameters.load_trained(make_stage(config), config, sharding.make_mesh(config.mesh))


def test_sizes_that_disagree_are_named(model):
    config = stage_config(configs.t2i_ar, model)
    config.model.head_dim = 8
    with pytest.raises(UserError, match=r"head_dim=16, config\.model\.head_dim is 8") as error:
        parameters.load_trained(make_stage(config), config, sharding.make_mesh(config.mesh))
    assert str(model) in str(error.value)
    config = stage_config(configs.t2i_ar, model)
    config.text.model.rope_theta = 5.0
    with pytest.raises(UserError, match=r"config\.text\.model\.rope_theta is 5\.0"):
        make_stage(config).frozen()


def test_either_generator_samples(model):
    drawn = []
    for kind in ("diffusion", "ar"):
        run = Execution(param_dtype="bfloat16", dtype="bfloat16")
        sampler = Sampler.from_folder(model, run=run, kind=kind)
        assert isinstance(sampler.generator, model_parts.GENERATORS[kind])
        assert sampler.image_size == 128
        drawn.append(sampler(["a"], Options(steps=1, height=32, width=32)))
        assert drawn[-1].shape == (1, 32, 32, 3)
    assert not np.array_equal(*drawn)


def test_what_is_trained_on_top_finds_the_frozen_parts(model, tmp_path):
    stage = make_stage(stage_config(configs.t2i_ar, model))
    trained = {"generator": model_folder.load(model, "ar", stage.network, "bfloat16")}
    model_folder.save(tmp_path, stage.describe(), trained)
    with pytest.raises(UserError, match="has no text"):
        Sampler.from_folder(tmp_path, model)
    sampler = Sampler.from_folder(tmp_path, model, text_encoder=model)
    assert sampler.max_length == stage.config.text.max_length
    assert sampler.text_tokenizer.pad_id == 1
    assert set(sampler.params) == {"generator", "text", "tokenizer"}


def test_a_generator_that_is_not_there(source, tmp_path):
    (source / "model/ar.safetensors").unlink()
    import_model(source / "model", source / "olmo", tmp_path / "model", META)
    with pytest.raises(UserError, match="no generator of the kind 'ar'.* 'diffusion'"):
        Sampler.from_folder(tmp_path / "model", kind="ar")
    (source / "model/diffusion.safetensors").unlink()
    refused(source, "has no generator: expected one or both of diffusion.pt and ar.pt")


BLOCK = "transformer_blocks.1.attn.k_proj.weight"
GENERATOR = "model/diffusion.safetensors"


@pytest.mark.parametrize(
    ("path", "name", "function", "match"),
    [
        (GENERATOR, BLOCK, lambda x: None, "missing"),
        (GENERATOR, BLOCK, lambda x: x[1:], r"shape \(31, 32\), expected \(32, 32\)"),
        (GENERATOR, BLOCK, lambda x: np.where(x == x.max(), x.dtype.type(np.inf), x), "NaN"),
        (GENERATOR, BLOCK, lambda x: x.astype(np.float32), "in other blocks"),
        (GENERATOR, BLOCK, lambda x: x.astype(np.int32), "I32, expected floats"),
        (GENERATOR, "x_embedder.weight", lambda x: x[:-1], "shape"),
        (GENERATOR, "transformer_blocks.0.pos_emb", lambda x: x[:, 1:], "shape"),
        (BAE, "encoder.latent_tokens", lambda x: x[:, 1:], "7"),
        (BAE, "encoder.latent_tokens", lambda x: None, "missing"),
        (BAE, "quantizer.embed", lambda x: x[1:], "shape"),
        (BAE, "decoder.up_layers.0.conv.bias", lambda x: x[1:], "shape"),
        (OLMO, "model.embed_tokens.weight", lambda x: x[1:], "shape"),
        (OLMO, "lm_head.weight", lambda x: x + 1, "copy"),
        (OLMO, "model.layers.0.mlp.up_proj.weight", lambda x: None, "missing"),
    ],
)
def test_a_damaged_tensor_is_named(source, path, name, function, match):
    change(source / path, name, function)
    told = {k: v for k, v in META["bae"].items() if k != "num_latent_tkns"}
    for bae in (told, META["bae"]):
        refused(source, f"{name.replace('.', '[.]')}.*{match}", {**META, "bae": bae})


def test_an_unknown_tensor_is_named(source):
    for name in ("encoder.mask", "encoder.transformer_blocks.99.attn.extra"):
        tensors = load_file(source / BAE)
        save_file({**tensors, name: np.zeros(3, np.float32)}, source / BAE)
        refused(source, f"{name}' unknown")
        save_file(tensors, source / BAE)


def cut(path, share=0.5):
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])


def edit(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (lambda s: cut(s / BAE), "damaged"),
        (lambda s: (s / BAE).write_bytes(b"\xff" * 100), "damaged"),
        (lambda s: (s / BAE).unlink(), "bae/model.safetensors is missing"),
        (lambda s: cut(s / OLMO, 0.99), "damaged"),
        (lambda s: (s / "olmo/config.json").unlink(), "cannot read .*config.json"),
        (lambda s: cut(s / "olmo/config.json"), "not valid JSON"),
        (lambda s: (s / "olmo/config.json").write_text("[" * 100_000), "not valid JSON"),
        (lambda s: (s / "olmo/tokenizer.json").unlink(), "no text tokenizer"),
        (lambda s: cut(s / "olmo/tokenizer.json"), "not a tokenizer"),
        (
            lambda s: make_random_published.write_text_tokenizer(s / "olmo/tokenizer.json", 300),
            "300 tokens",
        ),
        (lambda s: edit(s / "olmo/config.json", hidden_size="x"), "hidden_size is 'x'"),
        (lambda s: edit(s / "olmo/config.json", num_hidden_layers=3), "num_layers 2, .* 3"),
        (lambda s: edit(s / "olmo/config.json", vocab_size=65), "embed_tokens"),
        (lambda s: edit(s / "olmo/config.json", model_type="llama"), "expected 'olmo'"),
        (lambda s: edit(s / "olmo/config.json", rope_scaling={"type": "linear"}), "rope_scaling"),
        (lambda s: edit(s / "olmo/config.json", num_attention_heads=5), "5 heads"),
    ],
)
def test_damaged_files_are_one_sentence(source, damage, match):
    damage(source)
    refused(source, match, {"bae": META["bae"]})


@pytest.mark.parametrize(
    ("bae", "match"),
    [
        ({}, r"RoPE axes \[8, 28, 28\].*bae.axes_dims_rope"),
        ({"axes_dims_rope": [4, 6, 6]}, r"downsample_idx is \[7\].*bae.downsample_idx"),
        ({"patch_size": 8}, "patch_size=8, its tensors 4"),
        ({"patchsize": 8}, "unknown size 'patchsize'"),
        ({"axes_dims_rope": "x"}, "list of whole numbers"),
        ({**META["bae"], "bae_scale": -1}, "bae_scale"),
        ([], "expected an object"),
    ],
)
def test_sizes_given_must_fit(source, bae, match):
    refused(source, match, {"bae": bae})


def test_published_sizes_need_no_file():
    shapes = convert.reference_shapes(TokenizerNetwork(TokenizerConfig()))
    assert reference_sizes.measure_tokenizer(shapes, {}, "file") == TokenizerConfig()


def test_shards(original, source, tmp_path):
    tensors = load_file(source / OLMO)
    names = sorted(tensors)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for shard, own in shards.items():
        save_file({name: tensors[name] for name in own}, source / "olmo" / shard)
    (source / OLMO).unlink()
    index = source / "olmo/model.safetensors.index.json"
    weight_map = {name: shard for shard, own in shards.items() for name in own}
    index.write_text(json.dumps({"weight_map": weight_map}))
    import_model(source / "model", source / "olmo", tmp_path / "out", META)
    import_model(original / "model", original / "olmo", tmp_path / "whole", META)
    text = "text.safetensors"
    assert (tmp_path / "out" / text).read_bytes() == (tmp_path / "whole" / text).read_bytes()
    for wrong, match in (
        ({**weight_map, names[0]: "b.safetensors"}, "all shards are of one model"),
        ({**weight_map, names[0]: "../olmo/a.safetensors"}, "expected a .safetensors file name"),
        ({**weight_map, names[0]: "c.safetensors"}, "c.safetensors is missing"),
        ([], "no weight_map"),
    ):
        index.write_text(json.dumps({"weight_map": wrong}))
        refused(source, match)


def test_nothing_is_overwritten(original, tmp_path):
    (tmp_path / "kept").write_text("mine")
    for out in (tmp_path, tmp_path / "kept"):
        with pytest.raises(UserError, match="there already"):
            import_model(original / "model", original / "olmo", out, META)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    with pytest.raises(UserError, match="cannot write"):
        import_model(original / "model", original / "olmo", tmp_path / "kept/model", META)


class Evil:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def torch_archive(path, content, compression=zipfile.ZIP_STORED):
    """A torch file made by hand."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(content, protocol=2))
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/byteorder", "little")


@pytest.mark.torch  # and without: both answers are tested
def test_a_hostile_pickle_is_never_run(source, tmp_path):
    mark = tmp_path / "run"
    torch_archive(source / "model/diffusion.pt", {"module": Evil(mark)})
    refused(source, "diffusion.pt was refused" if HAS_TORCH else r"'instella-jax\[torch\]'")
    assert not mark.exists()


@needs_torch
@pytest.mark.parametrize("content", [{"weights": {}}, {"module": {"a": 3}}, {"module": []}, [1]])
def test_a_torch_file_without_weights(source, content):
    torch_archive(source / "model/diffusion.pt", content)
    refused(source, "module|no tensor")


@needs_torch
def test_a_tensor_that_claims_more_than_the_file(source):
    import torch

    huge = torch.ones(1).expand(10**6, 10**6)
    torch.save({"module": {"x_embedder.weight": huge}}, source / "model/diffusion.pt")
    refused(source, "claims tensors of")


def test_damaged_torch_files(source):
    path = source / "model/diffusion.pt"
    torch_archive(path, {"module": {}, "note": "x" * 1000})
    whole = path.read_bytes()
    path.write_bytes(whole[:700])
    refused(source, "diffusion.pt is damaged, cut off or not a torch file")
    path.write_bytes(whole.replace(b"xxxxx", b"xxyxx", 1))
    refused(source, "Bad CRC-32")
    torch_archive(path, {"module": {}}, zipfile.ZIP_DEFLATED)
    refused(source, "is compressed")
    path.write_bytes(pickle.dumps({"module": {}}))
    refused(source, "not a torch file")


def test_torch_missing_or_old_names_the_extra(source, model, tmp_path, monkeypatch):
    torch_archive(source / "model/diffusion.pt", {"module": {}})
    for torch in (None, types.SimpleNamespace(__version__="2.5.1")):
        monkeypatch.setitem(sys.modules, "torch", torch)
        refused(source, r"pip install 'instella-jax\[torch\]'")
        with pytest.raises(UserError, match=r"instella-jax\[torch\]"):
            export_model(model, "reference", tmp_path / "back")
        assert not (tmp_path / "back").exists()


def test_a_model_that_was_trained_here_has_no_published_form(tiny_tokenizer_folder, tmp_path):
    with pytest.raises(UserError, match="on a grid"):
        export_model(tiny_tokenizer_folder, "reference", tmp_path / "out")
    assert not list(tmp_path.iterdir())
    export_model(tiny_tokenizer_folder, "safetensors", tmp_path / "copy")
    name = "tokenizer.safetensors"
    same(load_file(tmp_path / "copy" / name), load_file(tiny_tokenizer_folder / name))


def test_files_are_read_back_by_the_library(tmp_path):
    arrays = {
        "a": np.arange(3).astype(jnp.bfloat16),
        "b": np.arange(6, dtype=np.float32).reshape(2, 3),
        "c": np.arange(4, dtype=np.float64).reshape(2, 2).T,
        "d": np.arange(8, dtype=np.float32)[::2],
    }
    specs = {name: (x.shape, x.dtype) for name, x in arrays.items()}
    pieces = [
        ("a", arrays["a"]),
        ("b", arrays["b"][:1]),
        ("b", arrays["b"][1:]),
        ("c", arrays["c"]),
        ("d", arrays["d"]),
    ]
    write_safetensors(tmp_path / "x.safetensors", specs, pieces)
    same(load_file(tmp_path / "x.safetensors"), arrays)
    with pytest.raises(ValueError, match="'c' got 0 bytes"):
        write_safetensors(tmp_path / "y.safetensors", specs, pieces[:3] + pieces[4:])


def test_looking_reads_no_data(original):
    parts, _ = inspect(original / "model", original / "olmo", META)
    assert list(parts) == ["tokenizer", "diffusion", "ar", "text"]
    assert len(parts["ar"].extra) == 4
    assert jax.tree.leaves(parts["text"].extra) == ["lm_head.weight"]


def test_the_command_says_one_sentence(tmp_path):
    command = "from instella_jax.cli import main; main()"
    result = subprocess.run(
        [sys.executable, "-c", command, "import", str(tmp_path / "no"), "--text-encoder",
         str(tmp_path), "--out", str(tmp_path / "out")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: {tmp_path / 'no'} is no folder")
    assert result.stderr.count("\n") == 1 and not (tmp_path / "out").exists()


def test_random_files_of_both_scales(tmp_path):
    make_random_published.make(tmp_path / "made", "tiny", torch=False)
    sizes = json.loads((tmp_path / "made/sizes.json").read_text())
    source = tmp_path / "made"
    import_model(source / "model", source / "olmo", tmp_path / "model", sizes)
    published = make_random_published.SCALES["published"]
    assert reference_sizes.tokenizer_sizes(published["bae"]) == TokenizerConfig()
    tokenizer = TextTokenizer.from_folder(tmp_path / "model")
    ids, mask = tokenizer.encode(["A cat,  été", ""])
    assert tokenizer.decode(ids, mask) == ["A cat,  été", ""]
    assert tokenizer.pad_id == 1 and not mask[1].any()
