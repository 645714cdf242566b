"""TensorBoard, if it is installed."""

import time
from pathlib import Path

from distgrow.tracking.base import NullTracker, Tracker
from distgrow.tracking.base_event import Line
from distgrow.tracking.events import Step
from distgrow.tracking.rate_events import RateTrial
from distgrow.tracking.spec import KINDS

#: What says when an event was, and is no curve.
_PLACE = ("step", "samples", "sfo", "time_s")
#: Seconds between two writes of what was logged; a killed run lacks as much at its end, here alone.
FLUSH_S = 10


class TensorBoard:
    """Write the numbers of evaluations, probes and trials of rates, and of steps ten times a second, against SFO."""

    waits = True

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), flush_secs=FLUSH_S)
        self._next = 0.0

    def log(self, event: Line) -> None:
        """Write the event's numbers."""
        kind, now = event["event"], time.monotonic()
        if kind == Step.kind and now < self._next:
            return
        if kind in (*KINDS, RateTrial.kind):
            self._next = now + 0.1
            for key, value in event.items():
                if isinstance(value, int | float) and key not in _PLACE:
                    self._writer.add_scalar(f"{kind}/{key}", value, event["sfo"])

    def close(self) -> None:
        """Close the files."""
        self._writer.close()


def tensorboard(folder: Path) -> Tracker:
    """Return a TensorBoard tracker, or one that keeps nothing if the package is not installed."""
    try:
        return TensorBoard(folder)
    except ImportError:
        return NullTracker()
