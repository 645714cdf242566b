"""metrics.jsonl: one JSON object a line."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

from distgrow.run.folder import storing
from distgrow.tracking.base_event import Line

_JSON = json.JSONEncoder(allow_nan=False, check_circular=False)


class JSONL:
    """Append one JSON object a line. Every line is in the file once it has been logged."""

    waits = True

    def __init__(self, path: Path) -> None:
        self._path = path
        with storing(path):
            _drop_torn_line(path)
            self._file = path.open("a", encoding="utf-8")

    def log(self, event: Line) -> None:
        """Append the event."""
        self.log_all([event])

    def log_all(self, events: Sequence[Line]) -> None:
        """Append the events."""
        with storing(self._path):
            self._file.write("".join(_JSON.encode(event) + "\n" for event in events))
            self._file.flush()

    def flush(self) -> None:
        """Write all lines to the disk itself."""
        with storing(self._path):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        with storing(self._path):
            self._file.close()


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
