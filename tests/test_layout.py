"""The rooms of the house: what may import what."""

import ast
import collections

import pytest

from tests.paths import ROOT

PACKAGE = "instella_jax"
# What stands above may import what stands below it, never the other way.
LAYERS = (
    "cli", "main", "commands", "app", "planning", "training", "evaluation", "sampling", "preparing",
    "codec", "stages", "losses", "weights", "checkpoints", "data", "kernels", "models",
    "reporting", "runtime", "config_keys", "stored_config", "config", "key_types", "user_paths",
    "errors",
)  # fmt: skip


def modules():
    """Sources by the dotted names of their modules."""
    paths = (ROOT / PACKAGE).rglob("*.py")
    dotted = {path: ".".join(path.relative_to(ROOT).with_suffix("").parts) for path in paths}
    return {name.removesuffix(".__init__"): path.read_text() for path, name in dotted.items()}


def imports(source, names):
    """Modules of the package that a source imports, at the top or inside of functions."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield from (n for n in (inner if inner in names else node.module,) if n in names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in names)


@pytest.fixture(scope="module")
def graph():
    sources = modules()
    return {name: set(imports(source, sources)) - {name} for name, source in sources.items()}


def find_circle(graph):
    """A path of imports that comes back to where it began, or None."""
    done, path = set(), []

    def walk(name):
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return None
        path.append(name)
        for other in sorted(graph[name]):
            if circle := walk(other):
                return circle
        path.pop()
        done.add(name)
        return None

    return next((circle for name in sorted(graph) if (circle := walk(name))), None)


def test_a_circle_would_be_found():
    assert find_circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]


def test_no_files_import_each_other_in_a_circle(graph):
    assert find_circle(graph) is None


def room(name):
    return name.split(".")[1] if "." in name else ""


def test_every_module_has_its_room(graph):
    rooms = {room(name) for name in graph} - {"", "__main__"}
    assert rooms == set(LAYERS)


def test_imports_lead_down(graph):
    height = {layer: number for number, layer in enumerate(LAYERS)}
    upwards = [
        f"{name} imports {other}"
        for name, others in graph.items()
        for other in others
        if room(name) in height and height.get(room(other), -1) < height[room(name)]
    ]
    assert not upwards


def test_no_two_test_files_have_one_name():
    """pytest imports them by their bare names, and a second one of a name ends the whole run."""
    names = collections.Counter(path.name for path in (ROOT / "tests").rglob("test_*.py"))
    assert [name for name, times in names.items() if times > 1] == []
