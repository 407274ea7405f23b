"""Metrics files."""

import io
import json
import subprocess
import sys

import numpy as np
from PIL import Image
from tensorboardX.proto.event_pb2 import Event

from instella_jax.reporting.metrics import MetricsWriter, read_metrics
from tests.paths import ROOT


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
    writer = MetricsWriter(tmp_path)
    writer.scalars(1, {"loss": 1})
    assert read_metrics(tmp_path) == [{"step": 1, "loss": 1.0}]
    writer.close()
    writer.scalars(2, {"loss": 1})
    assert len(read_metrics(tmp_path)) == 1


def test_resuming_removes_what_comes_again(tmp_path, caplog):
    with MetricsWriter(tmp_path) as writer:
        for step in (1, 2, 3, 4):
            writer.scalars(step, {"loss": step})
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 5, "lo')
    with MetricsWriter(tmp_path, start_step=2) as writer:
        writer.scalars(3, {"loss": 30})
    assert [(row["step"], row["loss"]) for row in read_metrics(tmp_path)] == [
        (1, 1.0),
        (2, 2.0),
        (3, 30.0),
    ]
    assert "not JSON" in caplog.text
    assert {entry.name for entry in tmp_path.iterdir()} == {"metrics.jsonl", "tensorboard"}


def test_other_processes_write_nothing(tmp_path):
    with MetricsWriter(tmp_path / "run", enabled=False) as writer:
        writer.scalars(1, {"loss": 1})
        writer.image(1, "grid", np.zeros((2, 2, 3), np.uint8))
    assert not (tmp_path / "run").exists()


def masked_crc(data):
    """CRC-32C bit by bit, masked as TensorBoard's records have it."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    crc ^= 0xFFFFFFFF
    rotated = crc >> 15 | crc << 17 & 0xFFFFFFFF
    return (rotated + 0xA282EAD8 & 0xFFFFFFFF).to_bytes(4, "little")


def read_events(folder):
    """Parse TensorBoard's record format: length (8 bytes), crc (4), data, crc (4)."""
    events = []
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        while data:
            end = 12 + int.from_bytes(data[:8], "little")
            assert data[8:12] == masked_crc(data[:8])
            assert data[end : end + 4] == masked_crc(data[12:end])
            events.append(Event.FromString(data[12:end]))
            data = data[end + 4 :]
    return events


def test_tensorboard_events_without_tensorflow(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.scalars(7, {"loss": 0.25, "bad": float("nan")}, prefix="eval")
        writer.image(7, "grid", np.full((4, 6, 3), 9, np.uint8))
    version, *events = read_events(tmp_path / "tensorboard")
    assert version.file_version == "brain.Event:2" and {event.step for event in events} == {7}
    values = {value.tag: value for event in events for value in event.summary.value}
    assert values["eval/loss"].simple_value == 0.25 and np.isnan(values["eval/bad"].simple_value)
    picture = values["grid"].image
    assert (picture.height, picture.width) == (4, 6)
    assert Image.open(io.BytesIO(picture.encoded_image_string)).getpixel((5, 3)) == (9, 9, 9)
    assert "tensorflow" not in sys.modules


def test_a_run_that_goes_on_takes_later_events_back(tmp_path):
    for start in (0, 4):
        with MetricsWriter(tmp_path, start_step=start) as writer:
            writer.scalars(start + 3, {"loss": 1.0})
    events = read_events(tmp_path / "tensorboard")
    kinds = [(event.step, event.WhichOneof("what")) for event in events]
    assert sorted(kinds) == [
        (0, "file_version"), (0, "file_version"), (3, "summary"), (5, "session_log"),
        (7, "summary"),
    ]  # fmt: skip


def test_a_full_disk_is_an_error_of_who_writes(tmp_path):
    """In a process that cannot write files of more than 1 kB."""
    code = """
import resource, sys
from instella_jax.reporting.metrics import MetricsWriter
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
with MetricsWriter(sys.argv[1]) as writer:
    for step in range(100):
        try:
            writer.{}
        except OSError as error:
            print(error.strerror)
            break
"""
    for number, call in enumerate(("scalars(step, {'a': 1.0})", "image(step, 'a', picture)")):
        script = code.format(call).replace("import resource", "import numpy, resource", 1)
        script = script.replace("\nwith", "\npicture = numpy.zeros((9, 9, 3), 'uint8')\nwith")
        done = subprocess.run(
            [sys.executable, "-c", script, tmp_path / str(number)],
            capture_output=True, text=True, check=False, cwd=ROOT,
        )  # fmt: skip
        assert (done.returncode, done.stdout, done.stderr) == (0, "File too large\n", "")
        assert (tmp_path / str(number) / "tensorboard").is_dir()
