"""Builds `notebooks/instella_jax_colab.ipynb` out of the script beside it, outputs included.

    pip install -e '.[notebook]'
    python tools/build_notebook.py

A cell of the script begins with `# %%`, one of Markdown with `# %% [markdown]`. Every cell is
executed, from top to bottom in a process of its own.
"""

import argparse
import base64
import io
import re
from pathlib import Path
from typing import Any

from PIL import Image

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
SCRIPT = NOTEBOOKS / "instella_jax_colab.py"


def cells(script: str) -> list[tuple[str, str]]:
    """Return ("markdown" or "code", text) of each cell of a script."""
    found = []
    for part in re.split(r"^# %%", script, flags=re.MULTILINE)[1:]:
        head, _, body = part.partition("\n")
        if head.strip() == "[markdown]":
            body = "\n".join(line.removeprefix("#").removeprefix(" ") for line in body.split("\n"))
        found.append(("markdown" if head.strip() else "code", body.strip("\n")))
    return found


def build(script: str) -> Any:
    """Return the notebook of a script, without outputs."""
    from nbformat import v4

    made = []
    for number, (kind, text) in enumerate(cells(script)):
        cell = v4.new_markdown_cell(text) if kind == "markdown" else v4.new_code_cell(text)
        # Else it is drawn anew each time.
        cell.id = f"cell-{number}"
        made.append(cell)
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return v4.new_notebook(cells=made, metadata={"kernelspec": kernel, "accelerator": "GPU"})


def execute(notebook: Any, folder: Path, timeout: int) -> None:
    """Execute all cells in a folder; an error in one is raised.

    Args:
      notebook: gets the outputs.
      folder: that the cells run in.
      timeout: seconds that one cell may take.
    """
    from nbclient import NotebookClient

    client = NotebookClient(
        notebook,
        timeout=timeout,
        resources={"metadata": {"path": str(folder)}},
        record_timing=False,
    )
    client.execute()


def tidy(notebook: Any) -> None:
    """Leave out of the outputs what is printed as errors, and give the pictures fewer colours."""
    for cell in notebook.cells:
        kept = [o for o in cell.get("outputs", ()) if o.get("name") != "stderr"]
        for output in kept:
            if "image/png" in (data := output.get("data", {})):
                picture = Image.open(io.BytesIO(base64.b64decode(data["image/png"])))
                small = io.BytesIO()
                picture.convert("RGB").quantize(64, dither=Image.Dither.NONE).save(
                    small, "PNG", optimize=True
                )
                data["image/png"] = base64.b64encode(small.getvalue()).decode()
        if cell.cell_type == "code":
            cell.outputs = kept


def main() -> None:
    """Parse the command line, execute and write."""
    parser = argparse.ArgumentParser(description="Builds the notebook.")
    parser.add_argument("--timeout", type=int, default=600, help="seconds that a cell may take")
    options = parser.parse_args()
    import nbformat

    notebook = build(SCRIPT.read_text(encoding="utf-8"))
    execute(notebook, NOTEBOOKS, options.timeout)
    tidy(notebook)
    nbformat.write(notebook, SCRIPT.with_suffix(".ipynb"))
    print(SCRIPT.with_suffix(".ipynb"))


if __name__ == "__main__":
    main()
