"""The protocol of trackers, and trackers of none and of several."""

from collections.abc import Iterable
from typing import Protocol

from distgrow.tracking.base_event import Line


class Tracker(Protocol):
    """A place where events go: each is a flat mapping with `event`, `step`, `samples`, `time_s` and its own keys."""

    def log(self, event: Line) -> None: ...

    def close(self) -> None: ...


class NullTracker:
    """Nothing is kept: for all ranks but the first."""

    def log(self, event: Line) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


class Trackers:
    """Several trackers as one."""

    def __init__(self, trackers: Iterable[Tracker]) -> None:
        self._trackers = list(trackers)

    def log(self, event: Line) -> None:
        """Log to all."""
        for tracker in self._trackers:
            tracker.log(event)

    def close(self) -> None:
        """Close all."""
        for tracker in self._trackers:
            tracker.close()
