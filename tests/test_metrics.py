"""Metrics files, throughput and the progress line."""

import contextlib
import io
import json
import os
import sys

import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from instella_jax.metrics import (
    MetricsWriter,
    Progress,
    Throughput,
    progress_line,
    read_metrics,
)


def test_scalars_are_strict_json_lines(tmp_path):
    with MetricsWriter(tmp_path / "run") as writer:
        writer.scalars(10, {"loss": np.float32(0.5), "n": 3}, prefix="train")
        writer.scalars(20, {"loss": float("nan")})
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()

    def refuse(name):
        raise AssertionError(name)

    rows = [json.loads(line, parse_constant=refuse) for line in lines]
    assert rows == [{"step": 10, "train/loss": 0.5, "train/n": 3.0}, {"step": 20, "loss": None}]
    assert read_metrics(tmp_path / "run") == rows


def test_every_line_is_on_disk_at_once(tmp_path):
    writer = MetricsWriter(tmp_path, tensorboard=False)
    writer.scalars(1, {"loss": 1})
    assert read_metrics(tmp_path) == [{"step": 1, "loss": 1.0}]
    writer.close()
    writer.scalars(2, {"loss": 1})
    assert len(read_metrics(tmp_path)) == 1


def test_resuming_removes_what_comes_again(tmp_path, caplog):
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        for step in (1, 2, 3, 4):
            writer.scalars(step, {"loss": step})
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 5, "lo')
    with MetricsWriter(tmp_path, start_step=2, tensorboard=False) as writer:
        writer.scalars(3, {"loss": 30})
    assert [(row["step"], row["loss"]) for row in read_metrics(tmp_path)] == [
        (1, 1.0),
        (2, 2.0),
        (3, 30.0),
    ]
    assert "not JSON" in caplog.text
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_other_processes_write_nothing(tmp_path):
    with MetricsWriter(tmp_path / "run", enabled=False) as writer:
        writer.scalars(1, {"loss": 1})
        writer.image(1, "grid", np.zeros((2, 2, 3), np.uint8))
        writer.text(1, "config", "a = 1")
    assert not (tmp_path / "run").exists()


def read_events(folder):
    """Parse TensorBoard's record format: length (8 bytes), crc (4), data, crc (4)."""
    values = []
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        while data:
            length = int.from_bytes(data[:8], "little")
            event = Event.FromString(data[12 : 12 + length])
            values += [(event.step, value) for value in event.summary.value]
            data = data[16 + length :]
    return values


def test_tensorboard_events_without_tensorflow(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.scalars(7, {"loss": 0.25}, prefix="eval")
        writer.image(7, "grid", np.full((4, 6, 3), 9, np.uint8))
        writer.text(7, "config", "a = 1\nb = *2*")
    events = {value.tag: (step, value) for step, value in read_events(tmp_path / "tensorboard")}
    step, value = events["eval/loss"]
    assert step == 7 and value.simple_value == 0.25
    picture = events["grid"][1].image
    assert (picture.height, picture.width) == (4, 6)
    text = events["config/text_summary"][1].tensor.string_val[0].decode()
    assert text.splitlines() == ["    a = 1", "    b = *2*"]
    assert "tensorflow" not in sys.modules


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def test_throughput_leaves_out_pauses_and_the_first_step():
    clock = Clock()
    meter = Throughput(window=100, clock=clock)
    assert meter.steps_per_second is None
    clock.now = 50.0  # compiling
    meter.update(1)
    assert meter.steps_per_second is None
    clock.now = 52.0
    meter.update(5)
    assert meter.steps_per_second == pytest.approx(2.0)
    meter.pause()
    meter.pause()
    clock.now = 1000.0
    meter.resume()
    meter.resume()
    clock.now = 1004.0
    meter.update(13)
    assert meter.steps_per_second == pytest.approx(12 / 6)


def test_throughput_follows_a_change_of_speed():
    clock = Clock()
    meter = Throughput(window=10, clock=clock)
    for second in range(100):
        clock.now = float(second)
        meter.update(second if second < 50 else 50 + 4 * (second - 50))
    assert meter.steps_per_second == pytest.approx(4.0)


def test_progress_line():
    line = progress_line(
        40, 400, {"lr": 1.0, "bit_accuracy": 0.875, "loss": 0.25}, 2.0, batch_size=64
    )
    assert line == "step  40/400  loss 0.2500  bit accuracy 0.8750  128 images/s  ETA 3:00"
    assert progress_line(1, 9, {"loss": 1}) == "step 1/9  loss 1.0000"
    assert progress_line(0, 90_000, {}, 1.0).endswith("ETA 1d 01:00:00")
    assert progress_line(0, 3_661, {}, 1.0).endswith("ETA 1:01:01")


def test_a_file_gets_plain_lines():
    out = io.StringIO()
    progress = Progress(out)
    progress.update("one")
    progress.message("saved")
    progress.update("two")
    progress.close()
    assert out.getvalue() == "one\nsaved\ntwo\n"


def test_nothing_is_said_when_disabled():
    out = io.StringIO()
    progress = Progress(out, enabled=False)
    progress.update("one")
    progress.message("two")
    progress.close()
    assert out.getvalue() == ""


def screen(text, columns):
    """What a terminal of unlimited height shows: a small model of CR, LF, erase and wrapping."""
    lines, column = [""], 0
    for char in text.replace("\x1b[K", "\0"):
        if char == "\r":
            column = 0
        elif char == "\n":
            lines.append("")
            column = 0
        elif char == "\0":
            lines[-1] = lines[-1][:column]
        else:
            if column == columns:
                lines.append("")
                column = 0
            lines[-1] = lines[-1][:column] + char + lines[-1][column + 1 :]
            column += 1
    return lines


def read_to_end(terminal):
    """All that was written to a terminal that nobody holds open any more, piece by piece."""
    pieces = []
    # The end is an empty read on some systems and an error on Linux.
    with contextlib.suppress(OSError):
        while piece := os.read(terminal, 10_000):
            pieces.append(piece)
    return b"".join(pieces)


def test_a_terminal_gets_one_rewritten_line():
    pty = pytest.importorskip("pty")
    leader, follower = pty.openpty()
    with os.fdopen(follower, "w") as out:
        progress = Progress(out)
        progress.update("step 1 with a long line " + "." * 200)
        progress.update("step 2")
        progress.message("saved")
        progress.update("step 3")
        progress.close()
    shown = read_to_end(leader).decode().replace("\r\n", "\n")
    os.close(leader)
    assert screen(shown, 80) == ["saved", "step 3", ""]
