"""TensorBoard, if it is installed."""

import time
from pathlib import Path

from distgrow.tracking.base import NullTracker, Tracker
from distgrow.tracking.base_event import Line

_PLACES = ("step", "samples", "sfo", "time_s")


class TensorBoard:
    """Scalars of evaluations and probes, and of steps ten times a second, against SFO."""

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder))
        self._next = 0.0

    def log(self, event: Line) -> None:
        """Write the event's numbers."""
        kind, now = event["event"], time.monotonic()
        if kind == "step" and now < self._next:
            return
        if kind in ("step", "eval", "probe"):
            self._next = now + 0.1
            for key, value in event.items():
                if isinstance(value, int | float) and key not in _PLACES:
                    self._writer.add_scalar(f"{kind}/{key}", value, event["sfo"])

    def close(self) -> None:
        """Close the files."""
        self._writer.close()


def tensorboard(folder: Path) -> Tracker:
    """A TensorBoard tracker where the package is installed."""
    try:
        return TensorBoard(folder)
    except ImportError:
        return NullTracker()
