import subprocess
import sys

from tests.paths import ROOT


def test_without_torch_it_is_one_sentence_and_nothing_is_written(tmp_path):
    code = """
import runpy, sys
sys.modules["torch"] = None
runpy.run_path("tools/make_random_published.py", run_name="__main__")
"""
    command = [sys.executable, "-c", code, str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: torch files (.pt) need torch")
    assert not list(tmp_path.iterdir())
