"""TensorBoard's event files, written at once, so that a full disk is an error of who writes."""

import itertools
import os
import socket
import struct
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np


class EventFile:
    """One new event file. Every method raises OSError where the file cannot be written.

    tensorboardX makes the protocol buffers; its own writer writes in a thread, which tells of a
    full disk in a traceback and nothing else.
    """

    def __init__(self, folder: Path, purge_step: int | None = None):
        """Make the file.

        Args:
          folder: made if it is not there.
          purge_step: from which step on TensorBoard forgets what other files of the folder say.
        """
        from tensorboardX.proto import event_pb2

        self._proto: Any = event_pb2
        folder.mkdir(parents=True, exist_ok=True)
        stem = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{os.getpid()}"
        names = (f"{stem}.{n}" for n in itertools.count())
        path = next(folder / name for name in names if not (folder / name).exists())
        # Unbuffered: what cannot be written is not tried again when the file is closed.
        self._file = path.open("wb", buffering=0)
        self._add(file_version="brain.Event:2")
        if purge_step is not None:
            start = self._proto.SessionLog(status=self._proto.SessionLog.START)
            self._add(step=purge_step, session_log=start)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Write numbers by name."""
        items = [dict(tag=name, simple_value=value) for name, value in values.items()]
        self._add(step=step, summary=dict(value=items))

    def image(self, step: int, name: str, picture: np.ndarray) -> None:
        """Write a picture, uint8 [H, W, 3]."""
        from tensorboardX import summary

        self._add(step=step, summary=summary.image(name, picture, dataformats="HWC"))

    def close(self) -> None:
        self._file.close()

    def _add(self, **fields: Any) -> None:
        """Append a record: its length, a checksum of that, an event, a checksum of that."""
        from tensorboardX.record_writer import masked_crc32c

        data = self._proto.Event(wall_time=time.time(), **fields).SerializeToString()
        length = struct.pack("<Q", len(data))
        checks = (struct.pack("<I", masked_crc32c(part)) for part in (length, data))
        rest = memoryview(b"".join((length, next(checks), data, next(checks))))
        while rest:
            rest = rest[self._file.write(rest) :]
