"""Config files of users, with the mistakes that there are."""

import os
import subprocess
import sys

import pytest

from instella_jax.commands import arguments, config_file
from instella_jax.config_keys import check_values
from instella_jax.errors import UserError
from tests.paths import ROOT

BEGIN = "from configs import tokenizer\ndef get_config():\n  config = tokenizer.get_config()\n"
MISTAKES = {
    "from nowhere import x\n": "fails at line 1: ModuleNotFoundError: No module named 'nowhere'",
    "x = 1\ndef get_config(:\n": "fails at line 2: SyntaxError: invalid syntax",
    "x = 1\n": "has no get_config(), which returns a config",
    "def get_config():\n  pass\n": ": get_config returned NoneType, expected an ml_collec",
    "def get_config():\n  return {}\n": ": get_config returned dict, expected an ml_collec",
    BEGIN + "  raise ValueError('one\\nother')\n": "fails at line 4: ValueError: one other",
    BEGIN + "  config.seed = 'x'\n  return config\n": "fails at line 4: TypeError: Could not over",
}


@pytest.mark.parametrize("text", MISTAKES)
def test_a_file_that_fails_is_told_with_its_line(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(text)
    for path in ("own.py", str(tmp_path / "own.py")):
        with pytest.raises(UserError) as error:
            config_file.load_config(path)
        said = str(error.value).removeprefix(f"config file {path}").lstrip()
        assert said.startswith(MISTAKES[text]) and "\n" not in said


def test_a_variant_for_a_file_without_is_told(tmp_path):
    (tmp_path / "own.py").write_text(BEGIN + "  return config\n")
    assert config_file.load_config(str(tmp_path / "own.py")).stage == "tokenizer"
    with pytest.raises(UserError, match="own.py fails: TypeError: get_config.. takes 0 pos"):
        config_file.load_config(f"{tmp_path / 'own.py'}:large")


def test_a_run_with_such_a_file_ends_in_a_sentence(tmp_path):
    (tmp_path / "own.py").write_text("1 / 0\n")
    command = [sys.executable, "-m", "instella_jax.main", "--config=own.py", "--mode=plan"]
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        command, cwd=tmp_path, env=environ, capture_output=True, text=True, check=False
    )
    assert run.returncode == 2 and not run.stdout
    assert run.stderr == (
        "error: config file own.py fails at line 1: ZeroDivisionError: division by zero\n"
    )


def test_a_key_that_nothing_reads_is_refused(tiny_tokenizer_config):
    config = tiny_tokenizer_config.copy_and_resolve_references()
    check_values(config)
    with config.unlocked():
        config.train.stepz = 3
    with pytest.raises(UserError, match="has train.stepz, .* did you mean train.steps"):
        check_values(config)
    with config.unlocked():
        del config.train["stepz"]
        config.soup = 3
    with pytest.raises(UserError, match="has soup, a key that nothing reads: `instella-jax keys`"):
        check_values(config)


def test_a_config_is_found_by_its_name_where_there_is_no_such_file(tmp_path, monkeypatch):
    assert (
        config_file.find_config("t2i_ar:instella_512") == f"{ROOT}/configs/t2i_ar.py:instella_512"
    )
    with pytest.raises(UserError, match="'t2i_a' does not exist.*or one of t2i_ar, t2i_diffusion"):
        config_file.find_config("t2i_a")
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "own.py").write_text("")
    assert config_file.find_config("~/own.py") == f"{tmp_path}/own.py"
    for flags in (["--config=t2i_ar"], ["--config", "t2i_ar"], ["-config=configs/t2i_ar.py"]):
        found = arguments.with_config_file(["--mode=plan", *flags, "--config.seed=1"])
        assert found[-1] == "--config.seed=1" and found[-2].endswith("configs/t2i_ar.py")
