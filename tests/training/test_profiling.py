import gzip
import json

import pytest

from instella_jax.training.loop import train
from instella_jax.training.profiling import StepTrace


@pytest.mark.thorough
def test_a_run_leaves_a_trace_of_the_steps_asked_for(tiny_tokenizer_config, tmp_path, capsys):
    config = tiny_tokenizer_config
    config.profile = 3
    config.mesh.data = 8
    train(config, tmp_path)
    assert f"profile: {tmp_path / 'profile'}" in capsys.readouterr().out
    (file,) = (tmp_path / "profile").rglob("*.trace.json.gz")
    events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
    steps = sorted(int(e["args"]["step_num"]) for e in events if e.get("name") == "train")
    assert steps == [2, 3, 4]


def test_no_trace_unless_asked_for(tmp_path):
    trace = StepTrace(tmp_path / "profile", 0, 1, print)
    for step in range(5):
        with trace.call(step, None):
            pass
    trace.close(None)
    assert not (tmp_path / "profile").exists()
