"""The visit to a chip: what was measured stays, whatever happens to a row."""

import argparse
import json

from benchmarks import accelerator

SLEEP = "import json, time; print(json.dumps({'what': 'first'}), flush=True); time.sleep(60)"


def test_a_row_that_takes_too_long_leaves_what_it_said():
    found, reason = accelerator.lines_of(["-c", SLEEP], 3.0)
    assert found in ([{"what": "first"}], [])  # nothing, where Python itself starts late
    assert reason == "not finished after 3 s"


def test_a_row_that_fails_says_why():
    found, reason = accelerator.lines_of(["-c", "raise SystemExit('out of memory')"], 60.0)
    assert (found, reason) == ([], "out of memory")


def test_figures_are_written_after_every_row(tmp_path, monkeypatch):
    figure = {"ms": 2.0, "least_ms": 1.0, "most_ms": 3.0, "first_call_s": 4.0}

    def measure(name, tiny, limit):
        if name == "ar":
            # Of the row before.
            assert "a product" in (tmp_path / "accelerator.md").read_text()
            yield {"row": name, "what": name, "reason": "out of memory"}
        else:
            yield {"row": name, "what": "a product", "chip": "H200", "jax": "0.12", **figure}

    monkeypatch.setattr(accelerator, "measure", measure)
    accelerator.run(argparse.Namespace(out=tmp_path, minutes=1.0, rows=["floors", "ar"], tiny=True))
    assert len(json.loads((tmp_path / "accelerator.json").read_text())) == 2
    table = (tmp_path / "accelerator.md").read_text()
    assert table.startswith("H200, jax 0.12, ")
    assert "| a product | 2.0 (1.0 to 3.0) | 4.0 |" in table
    assert "| ar | not measured: out of memory |" in table
