"""`instella-jax` as people type it: what is made, printed, refused and left alone."""

import argparse
import contextlib
import io
import json
import os
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from PIL import Image

from instella_jax import InstellaPipeline, cli
from instella_jax.commands import configured, doctor
from instella_jax.commands.prompts import Prompt, read_prompts
from instella_jax.errors import UserError
from instella_jax.models.functional import init_params
from instella_jax.reporting.pictures import save_png
from instella_jax.runtime import sharding
from instella_jax.sampling.records import read_record
from instella_jax.weights import lora_files
from tests.paths import ROOT

PROMPT = "a cat above a blue square"
COMMANDS = ("generate", "train", "plan", "import", "export", "data", "keys", "doctor", "completion")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def call(*arguments, given=None, monkeypatch=None):
    """Run a command in this process; return status, standard output and standard error."""
    out, err = io.StringIO(), io.StringIO()
    status = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["instella-jax", *map(str, arguments)])
        if given is not None:
            patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given)))
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                cli.main()
            except SystemExit as end:
                status = end.code or 0
    return status, out.getvalue(), err.getvalue()


def generate(*arguments, **given):
    status, out, err = call("generate", *arguments, "--steps=4", **given)
    assert status == 0, err
    return out


def pixels(name):
    with Image.open(name) as image:
        return np.asarray(image)


def refused(*arguments, **given):
    status, _, err = call(*arguments, **given)
    assert status == 2 and err.startswith("error: ") and err.count("\n") == 1, err
    return err.removeprefix("error: ")


def test_a_prompt_becomes_a_picture_and_the_next_one_another(tmp_path):
    for number in range(2):
        out = generate(PROMPT, "--seed=3")
        name = f"0000{number}-a-cat-above-a-blue-square-seed3.png"
        assert out.rstrip().endswith(f"drawn/{name}")
    files = sorted((tmp_path / "drawn").glob("0*.png"))
    assert len(files) == 2 and files[0].read_bytes() == files[1].read_bytes()
    wanted = InstellaPipeline.from_pretrained("demo")(PROMPT, seed=3, num_inference_steps=4)
    np.testing.assert_array_equal(pixels(files[0]), np.asarray(wanted.images[0]))


@pytest.mark.parametrize("model", ["demo", pytest.param("demo_ar", marks=pytest.mark.thorough)])
def test_a_picture_is_repeated_exactly_from_itself(model):
    generate(PROMPT, "two dogs", "--count=3", "--batch-size=4", "--seed=8", f"--model={model}",
             "--guidance-scale=3", "--negative-prompt=a pizza", "--temperature=0.8")  # fmt: skip
    for file in sorted(os.listdir("drawn")):
        if file.startswith("0"):
            status, out, err = call("generate", "--from", f"drawn/{file}", "--out=again.png",
                                    "--force")  # fmt: skip
            assert status == 0, err
            with open("again.png", "rb") as ours, open(f"drawn/{file}", "rb") as theirs:
                assert ours.read() == theirs.read()
    record = read_record("again.png")
    assert record["guidance"] == 2.0 and record["weights"]["folder"] == model
    assert ("steps" in record) == (model == "demo")
    generate("--from", "again.png", "--seed=1", "--out=other.png")
    other = read_record("other.png")
    assert other["seed"] == 1 and other["negative_prompt"] == "a pizza"
    assert (pixels("other.png") != pixels("again.png")).any()


def test_a_picture_of_other_weights_is_not_repeated():
    generate(PROMPT, "--out=a.png")
    with Image.open("a.png") as image:
        before, texts = np.asarray(image), dict(image.text)
    record = json.loads(texts["instella_jax"])
    record["weights"]["digests"]["generator"] = "0" * 32
    save_png("a.png", before, {**texts, "instella_jax": json.dumps(record)})
    sentence = refused("generate", "--from", "a.png", "--out=b.png")
    assert "a.png was made with other weights than demo has (differing: generator)" in sentence
    assert not os.path.exists("b.png")
    generate("--from", "a.png", "--model=demo", "--out=b.png")
    np.testing.assert_array_equal(pixels("b.png"), before)


def test_pictures_without_a_record_cannot_be_repeated():
    Image.new("RGB", (8, 8)).save("plain.png")
    with open("text.png", "w") as file:
        file.write("no picture")
    for name, sentence in (
        ("plain.png", "plain.png does not say how it was made: expected a PNG file of instella"),
        ("text.png", "text.png is no picture"),
        ("none.png", "cannot read none.png (No such file or directory)"),
    ):
        assert refused("generate", "--from", name).startswith(sentence)


def test_a_file_that_is_there_is_overwritten_by_force_alone():
    with open("mine.png", "wb") as file:
        file.write(b"mine")
    assert refused("generate", PROMPT, "--out=mine.png").startswith("mine.png is there already: ")
    with open("mine.png", "rb") as file:
        assert file.read() == b"mine"
    generate(PROMPT, "--out=mine.png", "--force")
    assert read_record("mine.png")["text"] == PROMPT
    sentence = refused("generate", PROMPT, "two dogs", "--out=more.png")
    assert sentence.startswith("2 pictures do not go into more.png: name a folder")


def test_lines_of_json_say_their_own_and_json_comes_out():
    lines = [
        "two dogs",
        json.dumps({"prompt": PROMPT, "seed": 5, "negative_prompt": "a tree"}),
        json.dumps({"prompt": PROMPT, "height": 48, "width": 80}),
    ]
    out = generate("--prompts=-", "--seed=2", "--json", given="\n".join(lines).encode())
    rows = [json.loads(line) for line in out.splitlines()]
    names = ("text", "seed", "negative_prompt", "height", "width")
    assert [tuple(row[name] for name in names) for row in rows] == [
        ("two dogs", 2, "", 64, 64), (PROMPT, 5, "a tree", 64, 64), (PROMPT, 2, "", 48, 80),
    ]  # fmt: skip
    assert [pixels(row["file"]).shape[:2] for row in rows] == [(64, 64), (64, 64), (48, 80)]
    assert [read_record(row["file"])["seed"] for row in rows] == [2, 5, 2]


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ('{"prompt": "a', "line 2 of prompt file p.txt begins with a brace and is not JSON"),
        ('{"text": "a"}', "line 2 of prompt file p.txt has the key 'text': expected prompt, neg"),
        ('{"seed": 1}', "line 2 of prompt file p.txt has no prompt: expected"),
        ('{"prompt": "a", "seed": "1"}', "line 2 of prompt file p.txt: seed is '1', expected a wh"),
        ('{"prompt": 3}', "line 2 of prompt file p.txt: prompt is 3, expected a text"),
    ],
)
def test_lines_that_are_not_as_expected_are_named(line, sentence):
    with open("p.txt", "w") as file:
        file.write(f"a cat\n{line}\n")
    with pytest.raises(UserError) as error:
        read_prompts("p.txt")
    assert str(error.value).startswith(sentence)


def test_a_prompt_file_is_texts_and_json():
    with open("p.txt", "w") as file:
        file.write('a cat\n\n{"prompt": "a dog", "width": 32}\n')
    assert read_prompts("p.txt") == [Prompt("a cat"), Prompt("a dog", width=32)]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "there is no prompt: give one, as in instella-jax generate"),
        (["a", "--prompts=x"], "give prompts or --prompts, not both"),
        (["a", "--model=nowhere"], "there is no model 'nowhere': expected demo or demo_ar"),
        (["a", "--steps=0"], "steps is 0: expected"),
        (["a", "--seed=-1"], "seed is -1: expected"),
        (["a", "--height=60"], "image size 60x64 does not fit"),
        (["a", "--guidance-scale=-2"], "--guidance-scale is -2: expected 0 to 1001"),
        (["--prompts=none.txt"], "prompt file none.txt cannot be read (No such file"),
    ],
)
def test_mistakes_are_one_sentence_and_leave_nothing(tmp_path, arguments, sentence):
    assert refused("generate", *arguments).startswith(sentence)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command):
    status, out, _ = call(command, "--help")
    assert status == 0 and f"usage: instella-jax {command}" in out
    if command not in ("keys", "doctor"):
        assert "examples:" in out and f"instella-jax {command} " in out


def test_unknown_arguments_are_refused():
    status, _, err = call("generate", PROMPT, "--stepz=3")
    assert status == 2 and "unrecognized arguments: --stepz=3" in err


def flags(*arguments):
    options, rest = cli.make_parser().parse_known_args(arguments)
    options.rest = rest
    return configured.flags_of(options)


def test_train_and_plan_are_modes_of_main(tmp_path):
    assert flags("train", "t2i_diffusion", "--workdir=runs/x", "train.steps=3") == [
        "--config=t2i_diffusion", "--mode=train", "--workdir=runs/x", "--config.train.steps=3",
    ]  # fmt: skip
    assert flags("plan", "tokenizer", "--workdir", "x y", "seed=1")[2:] == [
        "--workdir", "x y", "--config.seed=1",
    ]  # fmt: skip
    assert flags("eval", "heldout", "tokenizer") == ["--config=tokenizer", "--mode=eval"]
    (tmp_path / "config.json").write_text("{}")
    assert flags("plan", str(tmp_path)) == [f"--workdir={tmp_path}", "--mode=plan"]
    with pytest.raises(UserError, match="unexpected argument 'steps': keys are changed as"):
        flags("train", "t2i_diffusion", "steps")


@pytest.mark.slow
def test_a_run_is_trained_and_drawn_with(tiny_tokenizer_folder, tmp_path):
    run = subprocess.run(
        [sys.executable, "-m", "instella_jax", "train", ROOT / "tests/tiny_diffusion.py",
         f"--workdir={tmp_path / 'run'}", "train.steps=2", f"tokenizer={tiny_tokenizer_folder}",
         "sample.rho=0.6"],
        env={**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    params = {}
    for model in ("run", "run/model"):
        pipe = InstellaPipeline.from_pretrained(tmp_path / model)
        assert pipe.rho == 0.6
        params[model] = jax.tree.leaves(pipe.sampler.params["generator"])
        file = f"{model.replace('/', '-')}.png"
        generate(PROMPT, f"--model={tmp_path / model}", f"--out={file}")
        picture = pipe(PROMPT, num_inference_steps=4).images[0]
        np.testing.assert_array_equal(pixels(file), np.asarray(picture))
    # A model folder holds the run's parameters in bfloat16.
    for ours, theirs in zip(params["run"], params["run/model"], strict=True):
        np.testing.assert_array_equal(ours.astype("bfloat16").astype("float32"), theirs)
    # As version 0.1.0 left it, which had fewer keys.
    file = tmp_path / "run/config.json"
    config = json.loads(file.read_text())
    for section, key in (("loss", "draws"), ("loss", "time_shift"), ("optimizer", "kind")):
        del config[section][key]
    for key in ("lora", "pos_emb_std", "profile"):
        del config[key]
    file.write_text(json.dumps(config))
    generate(PROMPT, f"--model={tmp_path / 'run'}", "--out=old.png")
    np.testing.assert_array_equal(pixels("old.png"), pixels("run.png"))


def test_the_doctor_speaks_json(monkeypatch, capsys):
    facts = doctor.Facts(versions={"jax": "1"}, hardware=frozenset({"TPU"}), backend="cpu")
    monkeypatch.setattr(doctor, "examine", lambda: facts)
    assert doctor.main(as_json=True) == 1
    said = json.loads(capsys.readouterr().out)
    assert said["hardware"] == ["TPU"] and said["backend"] == "cpu" and len(said["problems"]) >= 1


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("instella-jax gen", {"generate"}),
        ("instella-jax generate --gui", {"--guidance", "--guidance-scale"}),
        ("instella-jax generate a --kind ", {"diffusion", "ar"}),
    ],
)
def test_a_shell_completes(line, expected, tmp_path):
    pytest.importorskip("argcomplete")
    environment = {
        **os.environ, "_ARGCOMPLETE": "1", "COMP_LINE": line, "COMP_POINT": str(len(line)),
        "_ARGCOMPLETE_IFS": "\n", "_ARGCOMPLETE_STDOUT_FILENAME": str(tmp_path / "answer"),
        "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path[1:]]),
    }  # fmt: skip
    (tmp_path / "answer").touch()
    subprocess.run([sys.executable, "-m", "instella_jax"], env=environment, check=False, timeout=60)
    found = (tmp_path / "answer").read_text().split("\n")
    assert {word.strip() for word in found} == expected


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_of_a_shell(shell):
    pytest.importorskip("argcomplete")
    status, out, _ = call("completion", shell)
    assert status == 0 and "_ARGCOMPLETE" in out and "instella-jax" in out


@pytest.fixture
def adapters(tmp_path):
    """A folder of random adapters of the autoregressive demo."""
    network = InstellaPipeline.from_pretrained("demo_ar").sampler.generator
    made = lora_files.make_adapters(network, 2, 2.0, ("q_proj", "net.2"), "float32")
    rng = np.random.default_rng(0)
    like = sharding.values(jax.eval_shape(lambda key: init_params(made, key), jax.random.key(0)))
    params = jax.tree.map(lambda x: 0.2 * rng.normal(size=x.shape).astype(np.float32), like)
    lora_files.save(tmp_path / "lora", network, made, params, base="demo_ar", step=1)
    return tmp_path / "lora"


@pytest.mark.slow
def test_adapters_are_used_and_a_picture_says_so_and_is_repeated(adapters):
    plain = InstellaPipeline.from_pretrained("demo_ar")
    generate(PROMPT, "--model=demo_ar", f"--lora={adapters}:0.5", "--out=a.png")
    assert (pixels("a.png") != np.asarray(plain(PROMPT).images[0])).any()
    plain.load_lora_weights(adapters, scale=0.5, merge=True)
    np.testing.assert_array_equal(pixels("a.png"), np.asarray(plain(PROMPT).images[0]))
    assert read_record("a.png")["weights"]["lora"] == [[str(adapters), 0.5]]
    generate("--from=a.png", "--out=again.png")
    with open("again.png", "rb") as ours, open("a.png", "rb") as theirs:
        assert ours.read() == theirs.read()
    generate("--from=a.png", f"--lora={adapters}:2", "--out=more.png")
    assert (pixels("more.png") != pixels("a.png")).any()
    generate("--from=a.png", "--model=demo_ar", "--out=without.png")
    assert "lora" not in read_record("without.png")["weights"]
    shutil.rmtree(adapters)
    assert refused("generate", "--from=a.png", "--out=b.png").startswith("no adapters at ")


@pytest.mark.parametrize(
    ("text", "expected"),
    [("a/b", ("a/b", 1.0)), ("a/b:0.5", ("a/b", 0.5)), ("a:b", ("a:b", 1.0)), ("5", ("5", 1.0)),
     ("a:inf", ("a:inf", 1.0)), ("a:-1", ("a", -1.0))],
)  # fmt: skip
def test_a_folder_of_adapters_may_have_a_scale(text, expected):
    options, _ = cli.make_parser().parse_known_args(["generate", "a", f"--lora={text}"])
    assert options.lora == [expected]


def process(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "instella_jax", *map(str, arguments), "--json"],
        env={**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def json_of(*arguments):
    """Run a command as a process of its own; its standard output is JSON and nothing else."""
    run = process(*arguments)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout), run.stderr


@pytest.mark.slow
def test_a_plan_and_held_out_figures_are_json(tiny_tokenizer_folder):
    tiny = f"{ROOT}/tests/tiny_tokenizer.py"
    plan, said = json_of("plan", tiny, "plan.devices=1", "plan.chip=H100")
    assert plan["memory"]["total"] == sum(v for k, v in plan["memory"].items() if k != "total")
    assert plan["fits"] and plan["chips"]["H100"]["fits"] and plan["chip"] == "H100"
    # 989 TFLOP/s at 22 %, and 8 steps of 8 pictures.
    rate = 0.22 * 989e12 / sum(plan["flops"].values())
    assert plan["chips"]["H100"]["images_per_second"] == pytest.approx(rate)
    assert plan["chips"]["H100"]["seconds"] == pytest.approx(64 / rate)
    assert "Plan of stage tokenizer" in said
    heldout, said = json_of("eval", "heldout", tiny, f"init_from={tiny_tokenizer_folder}")
    assert heldout["weights"] == str(tiny_tokenizer_folder) and heldout["stage"] == "tokenizer"
    assert f"psnr {heldout['heldout']['psnr']:.4f}" in said
    assert set(heldout["scenes"]) == {"psnr", "psnr_pca"} and "ssim" in heldout["reconstruction"]
    assert os.path.exists(heldout["pictures"])


def test_a_run_is_not_trained_with_json():
    run = process("train", "tokenizer")
    assert run.returncode == 2 and not run.stdout
    assert run.stderr == "error: --json is for --mode=eval and plan, not for --mode=train\n"


def test_reports_of_data_and_keys_are_json(tmp_path):
    def report(*arguments):
        status, out, err = call(*arguments, "--json")
        assert status == 0, err
        return json.loads(out)

    made = report("data", "scenes", "tars", "--count=4")
    assert made == {"pictures": 4, "tars": ["tars/00000.tar"]}
    taken = report("data", "import", "tars", "shards", "--workers=1")
    assert taken["complete"] and taken["kept"] == 4
    keys = report("keys", "t2i_ar")
    assert keys["stage"]["value"] == "ar" and "seed" in report("keys")


def test_every_command_that_makes_or_measures_something_has_json():
    """All but `train`, whose report is metrics.jsonl, `app` and `completion`."""
    found = {}

    def walk(parser, name):
        actions = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
        for action in actions:
            for key, inner in action.choices.items():
                walk(inner, f"{name} {key}".strip())
        if not actions:
            found[name] = "--json" in parser._option_string_actions

    walk(cli.make_parser(), "")
    assert {name for name, has in found.items() if not has} == {"train", "app", "completion"}


@pytest.mark.slow
def test_a_picture_is_made_again_in_its_type_and_with_other_settings():
    generate(PROMPT, "--model=demo_ar", "--dtype=bfloat16", "--guidance=2", "--out=a.png")
    generate("--from=a.png", "--out=again.png")
    with open("again.png", "rb") as ours, open("a.png", "rb") as theirs:
        assert ours.read() == theirs.read()
    assert read_record("again.png")["dtype"] == "bfloat16"
    generate("--from=a.png", "--guidance=5", "--out=more.png")
    record = read_record("more.png")
    assert (record["guidance"], record["dtype"]) == (5.0, "bfloat16")
