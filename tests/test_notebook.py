"""The notebook: what its script says, small, and executed from top to bottom."""

import importlib.util
import json
import os
import re

import pytest

from tests.paths import ROOT
from tools import build_notebook

NOTEBOOK = ROOT / "notebooks" / "instella_jax_colab.ipynb"
SECONDS = 900  # a cell that hangs, on however busy a machine


@pytest.fixture(scope="module")
def stored():
    return json.loads(NOTEBOOK.read_text(encoding="utf-8"))


def test_it_is_what_the_script_says(stored):
    found = [(cell["cell_type"], "".join(cell["source"])) for cell in stored["cells"]]
    assert found == build_notebook.cells(build_notebook.SCRIPT.read_text(encoding="utf-8"))


def test_it_is_stored_with_outputs_and_small(stored):
    assert NOTEBOOK.stat().st_size < 400_000
    outputs = [output for cell in stored["cells"] for output in cell.get("outputs", ())]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 5
    assert not [output for output in outputs if output["output_type"] == "error"]
    text = json.dumps([output.get("text", "") for output in outputs])
    assert not re.search(r"/(home|work|root|Users)/", text)


@pytest.mark.notebook
@pytest.mark.timeout(2 * SECONDS)
@pytest.mark.skipif(not importlib.util.find_spec("nbclient"), reason="needs the extra [notebook]")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_it_runs_from_top_to_bottom(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    notebook = build_notebook.build(build_notebook.SCRIPT.read_text(encoding="utf-8"))
    build_notebook.execute(notebook, tmp_path, SECONDS)
    printed = "".join(
        output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", ())
    )
    assert "the same picture again: True" in printed
    assert "the same bits: True" in printed
    losses = [float(loss) for loss in re.findall(r"held out at step \d+:.*?loss ([\d.]+)", printed)]
    assert len(losses) == 4 and losses[-1] < 0.5 * losses[0]
