"""What the command line says of mistakes: one sentence, a status, nothing touched."""

import hashlib
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest

from instella_jax.cli import make_parser
from instella_jax.reporting.metrics import read_metrics
from tests.paths import ROOT

TINY = "--config=tests/tiny_tokenizer.py"
TINY_T2I = "--config=tests/tiny_diffusion.py"
TOKENIZER = "--config=configs/tokenizer.py"


# A user that no list has, as in a container that is started with a number.
NOBODY = """
import pwd, runpy
def nobody(*_): raise KeyError("uid not found")
pwd.getpwuid = pwd.getpwnam = nobody
runpy.run_module("instella_jax.main", run_name="__main__", alter_sys=True)
"""


def run(*arguments, start=("-m", "instella_jax.main"), env=None):
    """Runs main as a user does; returns status, standard output and standard error."""
    result = subprocess.run(
        [sys.executable, *start, *(a if isinstance(a, bytes) else str(a) for a in arguments)],
        cwd=ROOT,
        env={**(os.environ if env is None else env), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    return result.returncode, result.stdout, result.stderr


def mistake(*arguments):
    """Runs main, checks that it refuses in one sentence, and returns the sentence."""
    status, _, err = run(*arguments)
    assert status == 2, err
    assert err.startswith("error: ") and err.count("\n") == 1, err
    return err.removeprefix("error: ").strip()


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()[:32]


def contents(folder):
    """Every file below a folder with what is in it."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "--config is missing: for example --config=configs/t2i_diffusion.py"),
        (["--config.train.steps=3"], "--config is missing"),
        (["--config=nowhere.py"], "config file 'nowhere.py' does not exist: expected a Python"),
        (["--config=nowhere.py", "--config.seed=1"], "config file 'nowhere.py' does not exist"),
        (["--config", "README.md"], "config file 'README.md' does not exist: expected a Python"),
        (["--config=configs/tokenizer.py:huge"], "unknown variant 'huge': expected none (the"),
        (
            [TOKENIZER, "--config.train.stepz=3"],
            "unknown key 'stepz' in --config.train.stepz: did you mean 'steps'?",
        ),
        (
            [TOKENIZER, "--config.trian.steps", "3"],
            "unknown key 'trian' in --config.trian.steps: did you mean 'train'?",
        ),
        ([TOKENIZER, "--config.seed.x=1"], "unknown key 'seed.x' in --config.seed.x"),
        (
            [TOKENIZER, "--config.train.steps=many"],
            "flag --config.train.steps=many: invalid literal for int() with base 10: 'many'",
        ),
        ([TOKENIZER, "--config.run.unroll=perhaps"], "flag --config.run.unroll=perhaps: "),
        ([TOKENIZER, "--config.train=3"], "flag --config.train=3: Failed to parse '3' as a"),
        ([TOKENIZER, "--wrkdir=x"], "Unknown command line flag 'wrkdir'. Did you mean: workdir ?"),
        ([TOKENIZER, "--mode=trian"], "flag --mode=trian: value should be one of <train|eval|"),
        ([TOKENIZER, "train"], "unexpected argument 'train': values are given as --flag=value"),
    ],
)
def test_flags_that_cannot_be_read(arguments, sentence):
    assert mistake(*arguments).startswith(sentence)


def test_help_suffices():
    status, out, _ = run("--help")
    assert status == 0
    for word in ("--config", "--workdir", "--mode", "train", "eval", "sample", "runs/"):
        assert word in out
    assert "python -m instella_jax.main --config=configs/t2i_diffusion.py" in out


@pytest.mark.slow
def test_a_workdir_of_another_run_is_left_alone(tmp_path):
    workdir = tmp_path / "run"
    status, _, err = run(TINY, f"--workdir={workdir}")
    assert status == 0, err
    before = contents(tmp_path)
    sentence = mistake(TINY, f"--workdir={workdir}", "--config.model.bits=16")
    assert "belongs to a run with model.bits=8, this one has 16" in sentence
    assert "choose another --workdir" in sentence
    assert "belongs to a run with" in mistake(
        "--config=configs/t2i_diffusion.py", f"--workdir={workdir}"
    )
    assert contents(tmp_path) == before


@pytest.mark.slow
def test_a_workdir_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("something of the user's")
    for place in ("file", "file/run"):
        sentence = mistake(TINY, f"--workdir={tmp_path / place}")
        assert sentence.startswith(f"workdir {tmp_path / place} cannot be written (")
        assert "choose another --workdir" in sentence
    assert (tmp_path / "file").read_text() == "something of the user's"


@pytest.fixture
def pictures(tmp_path):
    """A folder of two pictures without captions."""
    from PIL import Image

    folder = tmp_path / "pictures"
    folder.mkdir()
    for name in "ab":
        Image.fromarray(np.full((40, 40, 3), 128, np.uint8)).save(folder / f"{name}.png")
    return folder


@pytest.mark.slow
def test_data_and_weights_that_are_not_there_leave_no_trace(
    pictures, tiny_tokenizer_folder, tmp_path
):
    workdir = tmp_path / "run"
    folder = (TINY_T2I, f"--workdir={workdir}", "--config.data.kind=folder")
    tokenizer = f"--config.tokenizer={tiny_tokenizer_folder}"
    sentence = mistake(*folder, tokenizer, f"--config.data.folder.path={pictures}")
    assert sentence.startswith(f"{pictures} has no captions, only 2 .png; expected metadata.jsonl")
    sentence = mistake(*folder, tokenizer, f"--config.data.folder.path={tmp_path / 'no'}")
    assert sentence.startswith(f"{tmp_path / 'no'} is not a folder")
    sentence = mistake(TINY_T2I, f"--workdir={workdir}", f"--config.tokenizer={tmp_path / 'no'}")
    assert sentence.startswith(f"no model at {tmp_path / 'no'}: cannot read ")
    sentence = mistake(TINY_T2I, f"--workdir={workdir}")
    assert sentence.startswith("config.tokenizer names no model folder: give --config.tokenizer=")
    assert {path.name for path in workdir.iterdir()} <= {".lock"}


@pytest.mark.slow
def test_sizes_that_do_not_fit(tmp_path):
    workdir = f"--workdir={tmp_path / 'run'}"
    sentence = mistake(TINY, workdir, "--config.mesh.data=3")
    assert sentence.startswith("train.batch_size=8 does not split into 3 parts")
    sentence = mistake(TINY, workdir, "--config.data.image_size=40")
    assert sentence.startswith("image size 40x40 does not fit this tokenizer")
    sentence = mistake(TINY, workdir, "--config.run.remat=all")
    assert sentence.startswith("run.remat is 'all': expected one of")
    sentence = mistake(TINY, workdir, "--config.mesh.data=0")
    assert sentence == "mesh.data is 0: expected -1, or at least 1"


@pytest.mark.slow
def test_prompts_that_are_not_there(tmp_path):
    (tmp_path / "empty.txt").write_text("\n  \n")
    sample = (TINY_T2I, "--mode=sample", f"--config.sample.out={tmp_path / 'out'}")
    assert mistake(*sample).startswith("there is no prompt: give --config.sample.prompt=")
    sentence = mistake(*sample, f"--config.sample.prompts_file={tmp_path / 'empty.txt'}")
    assert sentence == f"prompt file {tmp_path / 'empty.txt'} is empty: expected one prompt a line"
    sentence = mistake(*sample, f"--config.sample.prompts_file={tmp_path / 'no.txt'}")
    assert sentence.startswith(f"prompt file {tmp_path / 'no.txt'} cannot be read")
    assert mistake(TINY, "--mode=sample").startswith("a tokenizer has no prompts")
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def tiny_run(tiny_tokenizer_folder, tmp_path_factory):
    """A run of other sizes than its config file, and its tokenizer, each moved since."""
    root = tmp_path_factory.mktemp("runs")
    shutil.copytree(tiny_tokenizer_folder, root / "tokenizer-then")
    status, _, err = run(
        TINY_T2I, f"--workdir={root / 'run-then'}", f"--config.tokenizer={root / 'tokenizer-then'}",
        "--config.model.num_heads=4", "--config.model.head_dim=4", "--config.train.steps=4",
        "--config.sample.steps=3", "--config.run.cpu_devices=1",
        "--config.data.scenes.max_objects=2",
    )  # fmt: skip
    assert status == 0, err
    (root / "run-then").rename(root / "run")
    (root / "tokenizer-then").rename(root / "tokenizer")
    return root / "run", f"--config.tokenizer={root / 'tokenizer'}"


@pytest.mark.slow
def test_a_run_is_used_by_its_workdir_alone(tiny_run, tmp_path):
    workdir, tokenizer = tiny_run
    for config in ([], [TINY_T2I]):
        out = tmp_path / str(len(config))
        status, text, err = run(
            *config, f"--workdir={workdir}", "--mode=sample", tokenizer,
            "--config.sample.prompt=two red hearts", f"--config.sample.out={out}",
        )  # fmt: skip
        assert status == 0 and f"step 4 of {workdir}" in text, err
        (row,) = map(json.loads, (out / "metadata.jsonl").read_text().splitlines())
        assert row["steps"] == 3 and row["text"] == "two red hearts"
        assert row["weights"] == {
            "folder": str(workdir),
            "step": 4,
            "digests": {
                "checkpoint": sha256(workdir / "checkpoints" / "4" / "manifest.json"),
                "tokenizer": sha256(workdir.parent / "tokenizer" / "tokenizer.safetensors"),
            },
        }
    status, text, err = run(f"--workdir={workdir}", "--mode", "eval", tokenizer)
    assert status == 0, err
    last = [row for row in read_metrics(workdir) if "heldout/loss" in row][-1]
    assert f"loss {last['heldout/loss']:.4f}" in text


@pytest.mark.slow
def test_pictures_name_the_model_folder_that_made_them(tiny_run, tmp_path):
    workdir, tokenizer = tiny_run
    model = workdir / "model"
    status, _, err = run(
        TINY_T2I, "--mode=sample", tokenizer, f"--config.init_from={model}",
        "--config.sample.prompt=a heart", f"--config.sample.out={tmp_path}",
        "--config.sample.steps=3", "--config.sample.negative_prompt=a dog",
        "--config.sample.guidance=0",
    )  # fmt: skip
    assert status == 0 and "the negative prompt does nothing with guidance 0" in err
    (row,) = map(json.loads, (tmp_path / "metadata.jsonl").read_text().splitlines())
    digests = {part: sha256(model / f"{part}.safetensors") for part in ("generator", "text")}
    digests["tokenizer"] = sha256(workdir.parent / "tokenizer" / "tokenizer.safetensors")
    assert row["weights"] == {"folder": str(model), "digests": digests}


@pytest.mark.slow
def test_a_user_without_a_name_a_home_or_unicode(tiny_run, tmp_path):
    workdir, tokenizer = tiny_run
    env = {"LANG": "C", "PYTHONIOENCODING": "ascii", "PYTHONPATH": str(ROOT)}
    env |= {key: os.environ[key] for key in ("XLA_FLAGS",) if key in os.environ}
    alone = dict(start=("-c", NOBODY), env=env)
    (tmp_path / "prompts.txt").write_bytes("\ufeffein Herz für 猫\n".encode())
    status, out, err = run(
        f"--workdir={workdir}", "--mode=sample", tokenizer, f"--config.sample.out={tmp_path}/猫",
        f"--config.sample.prompts_file={tmp_path / 'prompts.txt'}", **alone,
    )  # fmt: skip
    assert status == 0, err
    assert "no compilation cache: this user has no home" in err and "\\u732b" in out
    (row,) = map(json.loads, (tmp_path / "猫" / "metadata.jsonl").read_text().splitlines())
    assert row["text"] == "ein Herz für 猫"
    status, out, err = run(TINY, f"--workdir={tmp_path / 'run'}", "--config.train.steps=2", **alone)
    assert status == 0 and "model: " in out, err


@pytest.mark.slow
def test_a_prompt_that_is_not_utf_8_is_one_sentence(tiny_run, tmp_path):
    workdir, tokenizer = tiny_run
    sample = (f"--workdir={workdir}", "--mode=sample", tokenizer)
    for key in ("prompt", "negative_prompt"):
        text = f"--config.sample.{key}=ein H".encode() + b"\xe4" + b"schen"
        rest = () if key == "prompt" else ("--config.sample.prompt=a heart",)
        sentence = mistake(*sample, f"--config.sample.out={tmp_path / 'no'}", *rest, text)
        assert sentence == r"prompt 'ein H\udce4schen' is not UTF-8: give it as UTF-8 text"
    (tmp_path / "latin").write_bytes("ein Häschen".encode("latin-1"))
    sentence = mistake(*sample, f"--config.sample.prompts_file={tmp_path / 'latin'}")
    assert "cannot be read as UTF-8 (invalid continuation byte at byte 5): save it" in sentence
    assert not (tmp_path / "no").exists()


@pytest.mark.slow
def test_a_run_goes_on_where_it_was_moved_to(tiny_run, tmp_path):
    workdir, tokenizer = tiny_run
    moved = shutil.copytree(workdir, tmp_path / "moved")
    status, text, err = run(f"--workdir={moved}", tokenizer, "--config.train.steps=6")
    assert status == 0, err
    assert "continuing from step 4" in text and "CHANGED train.steps: 4 -> 6" in text
    assert "CHANGED tokenizer: " in text
    assert [row["step"] for row in read_metrics(moved) if "train/loss" in row] == [*range(1, 7)]


@pytest.mark.slow
def test_what_does_not_fit_a_run_is_one_sentence(tiny_run):
    workdir, tokenizer = tiny_run
    sample = (f"--workdir={workdir}", "--mode=sample", "--config.sample.prompt=a heart")
    sentence = mistake("--config=tests/tiny_ar.py", *sample, tokenizer)
    assert "is of stage 'ar', the run of" in sentence and "leave --config out" in sentence
    sentence = mistake(*sample, tokenizer, "--config.model.num_heads=2")
    assert "belongs to a run with model.num_heads=4, this one has 2" in sentence
    assert mistake(*sample, "--config.sample.stepz=3").startswith("unknown key 'stepz'")
    # Where the tokenizer was at the time.
    assert "--config.tokenizer=FOLDER" in mistake(*sample)


def test_a_workdir_without_a_run_needs_a_config(tmp_path):
    sentence = mistake(f"--workdir={tmp_path}", "--config.train.steps=3")
    assert sentence.startswith(f"--config is missing, and {tmp_path} is not the workdir of a run")


@pytest.mark.slow
def test_workdirs_without_a_run(tmp_path):
    for mode in ("eval", "sample"):
        sentence = mistake(
            TINY_T2I, f"--mode={mode}", f"--workdir={tmp_path}", "--config.sample.prompt=a heart",
            f"--config.sample.out={tmp_path / 'out'}",
        )  # fmt: skip
        assert sentence.startswith(f"{tmp_path} is not the workdir of a run: cannot read config")


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["import", "~/in", "--text-encoder", "~/olmo", "--out", "~/out"],
         ["source", "text_encoder", "out"]),
        (["export", "~/in", "--to", "orbax", "--out", "~/out"], ["source", "out"]),
        (["data", "encode", "~/model", "~/in", "~/out"], ["model", "source", "out"]),
        (["data", "scenes", "~/out"], ["out"]),
    ],
)  # fmt: skip
def test_a_tilde_is_the_home_folder_in_arguments(monkeypatch, arguments, names):
    monkeypatch.setenv("HOME", "/home/somebody")
    options = make_parser().parse_args(arguments)
    assert all(str(getattr(options, name)).startswith("/home/somebody/") for name in names)
