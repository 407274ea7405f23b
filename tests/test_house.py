"""Rules of the house that no other test would notice: imports, metadata, licences."""

import ast
import json
import re
import subprocess
import sys
import tomllib
from importlib import metadata

import pytest

import instella_jax
from tests.paths import ROOT

HEAVY = ("tensorflow", "torch", "gradio")


def python(code):
    """Run code in a fresh interpreter and return what it prints as JSON."""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def test_the_public_surface_is_imported_when_it_is_asked_for():
    code = """
import json, sys
before = set(sys.modules)
import instella_jax
others = sorted(name for name in set(sys.modules) - before if not name.startswith("instella_jax"))
from instella_jax import InstellaPipeline
listed = "InstellaPipeline" in dir(instella_jax)
print(json.dumps([others, InstellaPipeline.__module__, listed]))
"""
    others, module, listed = python(code)
    assert {name.split(".")[0] for name in others} <= sys.stdlib_module_names
    assert module == "instella_jax.sampling.pipeline" and listed
    with pytest.raises(ImportError, match="InstellaPipelin"):
        from instella_jax import InstellaPipelin  # noqa: F401 # pyright: ignore


def test_every_module_imports_without_tensorflow_and_torch():
    code = """
import importlib, json, pkgutil, sys
import instella_jax
names = [m.name for m in pkgutil.walk_packages(instella_jax.__path__, "instella_jax.")]
for name in names:
    importlib.import_module(name)
print(json.dumps([names, sorted(sys.modules)]))
"""
    names, modules = python(code)
    assert "instella_jax.data.loader" in names
    assert not set(HEAVY) & set(modules)


def test_pyproject_holds_tool_settings_only():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert set(settings) == {"build-system", "tool"}


def test_the_licence_is_whole():
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text and "END OF TERMS AND CONDITIONS" in text


def test_the_installed_metadata_is_that_of_the_sources():
    try:
        installed = metadata.distribution("instella-jax")
    except metadata.PackageNotFoundError:
        pytest.skip("instella-jax is not installed here")
    assert installed.version == instella_jax.__version__
    extras = set(installed.metadata.get_all("Provides-Extra") or ())
    assert extras >= {"cuda", "rocm", "tpu", "app", "torch", "test"}
    scripts = {entry.name: entry.value for entry in installed.entry_points}
    assert scripts["instella-jax"] == "instella_jax.cli:main"


def distribution(name):
    """`name` as indices spell it, without version and extras."""
    return re.sub(r"[-_.]+", "-", re.split(r"[\[<>=!~ ]", name)[0]).lower()


def requirements(name):
    """What setup.py assigns to a name: a list, or a dict of lists."""
    for node in ast.parse((ROOT / "setup.py").read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
            return ast.literal_eval(node.value)
    raise AssertionError(f"setup.py has no {name}")


def imported_packages():
    """Top-level names that the package imports, without its own and the standard library's."""
    modules = set()
    for path in (ROOT / "instella_jax").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                modules |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                modules.add(node.module)
    return {name.split(".")[0] for name in modules} - sys.stdlib_module_names - {"instella_jax"}


def test_what_is_required_is_imported_and_what_is_imported_is_required():
    required = {distribution(name) for name in requirements("REQUIRES")}
    optional = {distribution(name) for names in requirements("EXTRAS").values() for name in names}
    # Packages of extras need not be installed here, and are called as they are imported.
    installed = metadata.packages_distributions()
    providers = {
        name: {distribution(provider) for provider in installed.get(name, [name])}
        for name in imported_packages()
    }
    assert len(providers) > 10
    unknown = [name for name, found in providers.items() if not found & (required | optional)]
    assert not unknown, "imported, but setup.py does not require it"
    unused = required - set().union(*providers.values())
    assert not unused, "required by setup.py, but imported nowhere"


def test_the_changelog_knows_the_version():
    assert re.search(
        rf"^## {re.escape(instella_jax.__version__)}\b",
        (ROOT / "CHANGELOG.md").read_text(),
        re.MULTILINE,
    )


def sources():
    """Text of every source and document by its path in the clone."""
    kinds = {".py", ".sh", ".md", ".ipynb"}
    folders = ("benchmarks", "configs", "docs", "instella_jax", "launch", "tests", "tools")
    found = [path for folder in folders for path in sorted((ROOT / folder).rglob("*"))]
    files = [*ROOT.glob("*.md"), ROOT / "setup.py", *found]
    return {str(path.relative_to(ROOT)): path.read_text() for path in files if path.suffix in kinds}


def test_every_document_that_is_named_is_in_the_clone():
    texts = sources()
    elsewhere = [name for name, text in texts.items() if re.search(r"\bSPE[C]\b", text)]
    assert not elsewhere, "a clone holds no such document: docs/model.md has the mathematics"
    named = {
        (name, file)
        for name, text in texts.items()
        for file in re.findall(r"(?<![\w/.])docs/[\w./-]*\w", text)
    }
    assert len(named) > 10
    assert not {(name, file) for name, file in named if not (ROOT / file).exists()}


def test_both_maps_name_every_folder():
    inside = [path for path in (ROOT / "instella_jax").iterdir() if (path / "__init__.py").exists()]
    folders = {f"instella_jax/{path.name}" for path in inside}
    folders |= {"configs", "launch", "benchmarks", "tools", "tests"}
    for name in ("README.md", "docs/architecture.md"):
        text = (ROOT / name).read_text(encoding="utf-8").split("## Map")[1].split("\n## ")[0]
        rows = " ".join(line.split("|")[1] for line in text.splitlines() if line.startswith("| `"))
        named = {place.removesuffix("/") for place in re.findall(r"`([^`]+)`", rows)}
        # A row may name folders of the package after the first of them.
        named |= {f"instella_jax/{place}" for place in named}
        assert folders <= named, (name, folders - named)


def test_every_section_that_is_named_is_in_its_document():
    named = {
        (name, section, file)
        for name, text in sources().items()
        for section, file in re.findall(r'"([^"]+)" in (docs/\w+\.md)', " ".join(text.split()))
    }
    assert len(named) > 5
    for name, section, file in named:
        assert f"## {section}\n" in (ROOT / file).read_text(), name


def error_messages():
    """Parts of the messages of user errors that stand in the sources, by place."""
    for name, text in sources().items():
        if not name.startswith("instella_jax/") or not name.endswith(".py"):
            continue
        for node in ast.walk(ast.parse(text)):
            if not isinstance(node, ast.Call) or getattr(node.func, "id", "") != "UserError":
                continue
            for message in node.args[:1]:
                parts = message.values if isinstance(message, ast.JoinedStr) else [message]
                texts = [part.value for part in parts if isinstance(part, ast.Constant)]
                yield f"{name}:{node.lineno}", texts, isinstance(parts[-1], ast.Constant)


def test_messages_of_user_errors_end_in_no_full_stop():
    messages = list(error_messages())
    assert len(messages) > 100
    ended = [where for where, texts, last in messages if last and texts[-1].rstrip().endswith(".")]
    assert not ended
