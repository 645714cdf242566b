"""metrics.jsonl: one JSON object a line."""

import json
import os
import time
from pathlib import Path

from distgrow.run.folder import storing
from distgrow.tracking.base_event import Line

_JSON = json.JSONEncoder(allow_nan=False, check_circular=False)


class JSONL:
    """Append one JSON object a line.

    A step line waits at most a tenth of a second for the next one: an update may take a few hundred microseconds, and
    lines are cheaper to write together. Any other line is written at once, with those before it.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._waiting = path, list[Line]()
        self._due = 0.0
        with storing(path):
            _drop_torn_line(path)
            self._file = path.open("a", encoding="utf-8")

    def log(self, event: Line) -> None:
        """Append the event."""
        self._waiting.append(event)
        if time.monotonic() >= self._due or event["event"] != "step":
            self._write()

    def flush(self) -> None:
        """Write the lines that wait, to the disk itself."""
        self._write()
        with storing(self._path):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._write()
        with storing(self._path):
            self._file.close()

    def _write(self) -> None:
        with storing(self._path):
            self._file.write("".join(_JSON.encode(event) + "\n" for event in self._waiting))
            self._file.flush()
        self._waiting.clear()
        self._due = time.monotonic() + 0.1


def _drop_torn_line(path: Path) -> None:
    """Cut off a last line that a crash left without its end."""
    if not path.exists():
        return
    with path.open("rb+") as file:
        size = file.seek(0, 2)
        tail_start = max(0, size - (1 << 20))
        file.seek(tail_start)
        tail = file.read()
        if tail and not tail.endswith(b"\n"):
            file.truncate(tail_start + tail.rfind(b"\n") + 1)
