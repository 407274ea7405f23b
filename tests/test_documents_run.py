"""Every block of commands in README.md and docs/ is run here, or says above it why it is not.

`<!-- needs: ... -->` stands above what needs more than the package, `<!-- takes: minutes -->` above
what is too long for a test; README.md, which shows on its own, is marked in `README` below.
"""

import os
import re
import shlex
import subprocess
import sys

import numpy as np
import pytest

from instella_jax.reporting.pictures import save_png
from tests.paths import ROOT
from tests.test_documents import DOCUMENTS

BLOCK = re.compile(r"((?:<!-- [^\n]* -->\n)?)^```(\w*)\n(.*?)^```", re.S | re.M)
COMMAND = re.compile(r"^(\$ )?(pip|python|instella-jax|echo|eval|bash|sbatch|srun|docker) ", re.M)
MARK = r"<!-- (needs: .+|takes: minutes) -->\n"
README = {"pip install": "takes: minutes", "/my/pictures": "needs: pictures"}


def blocks(path):
    """Return language, text and mark ("" for none) of each block of commands or Python."""
    found = []
    for mark, language, text in BLOCK.findall(path.read_text(encoding="utf-8")):
        if language == "python" or (language in ("", "bash", "sh") and COMMAND.search(text)):
            if path.name == "README.md":
                mark = next((why for part, why in README.items() if part in text), "")
            found.append((language or "bash", text, mark))
    return found


def to_run(path):
    return [(language, text) for language, text, mark in blocks(path) if not mark]


RUN = [path for path in DOCUMENTS if to_run(path)]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.stem)
def test_marks_are_of_blocks_and_say_why(path):
    text, found = path.read_text(encoding="utf-8"), blocks(path)
    if path.name != "README.md":
        assert all(not mark or re.fullmatch(MARK, mark) for _, _, mark in found)
        assert len(re.findall(MARK, text)) == sum(bool(mark) for _, _, mark in found)


def test_the_documents_that_teach_the_demo_are_run():
    assert {"README", "terminal", "pipeline", "codec"} <= {path.stem for path in RUN}


@pytest.mark.slow
@pytest.mark.parametrize("path", RUN, ids=lambda path: path.stem)
def test_blocks_do_what_they_say(path, tmp_path):
    """Run those of one document in one folder, one after the other, as a reader does."""
    (tmp_path / "pictures").mkdir()
    for number, shade in enumerate((40, 200)):
        save_png(tmp_path / f"pictures/{number}.png", np.full((64, 64, 3), shade, np.uint8))
    (tmp_path / "prompts.txt").write_text("a cat on a red background\n")
    (tmp_path / "docs").symlink_to(ROOT / "docs")
    python = shlex.quote(sys.executable)
    shell = [f'python() {{ {python} "$@"; }}', 'instella-jax() { python -m instella_jax "$@"; }']
    parts = to_run(path)
    scripts = ["\n".join([*shell, text]) for language, text in parts if language == "bash"]
    code = "\n".join(text for language, text in parts if language == "python")
    runs = [["bash", "-euo", "pipefail", "-c", script] for script in scripts]
    runs += [[sys.executable, "-c", code]] if code else []
    for run in runs:
        done = subprocess.run(
            run, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True,
            text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, (run, done.stderr)
    if path.stem == "terminal":
        assert (tmp_path / "heart.png").read_bytes() == (tmp_path / "again.png").read_bytes()
        assert len(list((tmp_path / "dogs").glob("0*.png"))) == 4
    if path.stem == "codec":
        assert {file.stem for file in (tmp_path / "back").iterdir()} >= {"0", "1"}
    if path.stem == "pipeline":
        assert (tmp_path / "cat.png").exists() and (tmp_path / "cat.gif").exists()
