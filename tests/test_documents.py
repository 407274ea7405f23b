"""The commands in README.md and docs/ exist, with their options and keys; links lead somewhere."""

import re
import shlex

import pytest

from instella_jax.cli import make_parser
from instella_jax.commands.config_file import find_config, load_config
from instella_jax.config_keys import KEYS
from tests.paths import ROOT

DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MODULE = r"python -m (instella_jax\.main|benchmarks\.\w+|tools\.\w+)"


def fenced(path, languages):
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", path.read_text(encoding="utf-8"), re.S | re.M)
    return [text for language, text in blocks if language in languages]


def commands(path):
    """Command lines in code blocks, and those in code spans that have options."""
    text = path.read_text(encoding="utf-8")
    spans = [" ".join(span.split()) for span in re.findall(r"(?<!`)`([^`]+)`(?!`)", text)]
    lines = [span for span in spans if "--" in span]
    for block in fenced(path, ("", "bash", "sh", "console")):
        lines += block.replace("\\\n", " ").splitlines()
    for line in lines:
        line = re.sub(r'"?\$\((.*?)\)"?', r"; \1", line.split("  #")[0])
        for part in re.split(r"&&|\||;", line):
            if re.search(rf"{MODULE} |instella-jax \w", part):
                yield part.strip().removeprefix("$ ")


def every(find):
    return [
        pytest.param(value, id=f"{path.stem}-{number}")
        for path in DOCUMENTS
        for number, value in enumerate(find(path))
    ]


def check_config_flags(words):
    flags = dict(re.fullmatch(r"--([\w.]+)=?(.*)", word, re.S).groups() for word in words)
    config = None
    if "config" in flags and "NAME" not in flags["config"]:
        config = load_config(find_config(flags["config"]))
    for name in flags:
        key = name.removeprefix("config.")
        if key != name and key not in ("KEY", "NAME"):
            known = KEYS if config is None else set(config_keys(config))
            assert key in known, key
        elif key == name:
            assert name in ("config", "mode", "workdir", "help", "distributed", "json"), name


def config_keys(config, prefix=""):
    for key, value in config.items():
        if hasattr(value, "items"):
            yield from config_keys(value, f"{prefix}{key}.")
        yield f"{prefix}{key}"


@pytest.mark.parametrize("command", every(commands))
def test_commands_have_their_options(command):
    found = re.search(rf"({MODULE}|instella-jax)(.*)", command, re.S)
    words = shlex.split(found[3].split(" > ")[0].split(" < ")[0])
    if "..." in command or {"COMMAND", "ACTION", "BENCHMARK"} & set(words):
        return
    if found[1] == "instella-jax":
        if words[0].startswith("-"):
            check_config_flags(words)
            return
        options, rest = make_parser().parse_known_args(words)
        assert getattr(options, "takes_more", False) or not rest, rest
    elif found[2] == "instella_jax.main":
        check_config_flags(words)
    elif "NAME" not in found[2]:
        source = (ROOT / f"{found[2].replace('.', '/')}.py").read_text(encoding="utf-8")
        if "benchmarks.arguments" in source or "benchmarks import arguments" in source:
            source += (ROOT / "benchmarks/arguments.py").read_text(encoding="utf-8")
        for word in words:
            if word.startswith("--") and not word.startswith("--config"):
                flag = word.split("=")[0]
                assert f'"{flag}"' in source or f'"{flag[2:]}"' in source, word


@pytest.mark.parametrize("code", every(lambda path: fenced(path, ("python",))))
def test_python_is_python(code):
    compile(code, "document", "exec")


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.stem)
def test_links_lead_somewhere(path):
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.S | re.M)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"https?:|#|mailto:", target):
            assert (path.parent / target.split("#")[0]).exists(), target
