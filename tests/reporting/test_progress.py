"""The display of progress and its rate."""

import contextlib
import io
import os

import pytest

from instella_jax.reporting.progress import Progress, Throughput, progress_line


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


def test_lines_that_come_too_soon_are_left_out_but_for_the_last():
    out, clock = io.StringIO(), Clock()
    progress = Progress(out, interval=10.0, prefix="process 0 of 2: ", clock=clock)
    for second in (0, 3, 9, 10, 12, 19):
        clock.now = float(second)
        progress.update(f"{second} s")
    progress.message("a message")
    progress.close()
    progress.close()
    shown = ["process 0 of 2: 0 s", "process 0 of 2: 10 s", "a message", "process 0 of 2: 19 s"]
    assert out.getvalue().splitlines() == shown


def test_a_line_that_was_shown_is_not_shown_again():
    out, clock = io.StringIO(), Clock()
    progress = Progress(out, interval=10.0, clock=clock)
    progress.update("1")
    progress.update("2")
    clock.now = 10.0
    progress.update("3")
    progress.close()
    assert out.getvalue() == "1\n3\n"
