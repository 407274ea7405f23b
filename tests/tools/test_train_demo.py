import json
import subprocess
import sys

import pytest
from flax.traverse_util import flatten_dict

from instella_jax.commands.config_file import find_config, load_config
from tests.paths import ROOT
from tools import train_demo


def test_steps_fill_the_minutes_in_whole_intervals():
    assert train_demo.planned_steps(0.1, 10) == 6_000
    assert train_demo.planned_steps(0.11, 10) == 5_400  # 5,454
    assert train_demo.planned_steps(100.0, 1) == train_demo.PROBE


def test_the_speed_is_that_of_the_last_lines(tmp_path):
    speeds = [1.0, 64.0, 32.0, 16.0]
    lines = [{"step": 0, "heldout/loss": 1.0}]
    lines += [{"step": i, "train/images_per_second": speed} for i, speed in enumerate(speeds)]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "metrics.jsonl").write_text(text, encoding="utf-8")
    assert train_demo.seconds_per_step(tmp_path, 112) == pytest.approx(3.0)


@pytest.mark.parametrize("given", ["painter=3", "ar", "ar=soon"])
def test_nonsense_is_refused(given, tmp_path):
    command = [sys.executable, "-m", "tools.train_demo", str(tmp_path / "out"), "--minutes", given]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 2 and repr(given) in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("part", train_demo.PARTS)
def test_every_part_sets_keys_that_its_config_has(part, tmp_path):
    _, _, _, file, *settings = train_demo.arguments(part, tmp_path, 400)
    config = load_config(find_config(file.removeprefix("--config=")))
    known = flatten_dict(config.to_dict(), sep=".")
    keys = [text.split("=")[0].removeprefix("--config.") for text in settings]
    assert set(keys) - {"--workdir"} <= set(known) and "train.steps" in keys
