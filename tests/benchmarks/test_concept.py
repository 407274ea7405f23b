"""The pictures that teach the demo an object are the same whenever they are chosen."""

import os
import subprocess
import sys

from tests.paths import ROOT

CHOOSE = """
from benchmarks.concept import scenes, varied
from instella_jax.data.scenes import sprites
found = scenes(("owl",) * 12 + sprites.CORE, "owl", "new", 60)
chosen = varied(found, 12)
assert len({text for text, _ in chosen}) == 12 and all("owl" in s.counts for _, s in chosen)
print("\\n".join(text for text, _ in chosen))
"""


def test_the_choice_does_not_depend_on_the_process():
    texts = [
        subprocess.run(
            [sys.executable, "-c", CHOOSE],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)},
            capture_output=True, text=True, check=True,
        ).stdout
        for seed in ("1", "2", "3")
    ]  # fmt: skip
    assert texts[0] == texts[1] == texts[2] and texts[0].count("\n") == 12
