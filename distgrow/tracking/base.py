"""The protocol of trackers, a tracker that keeps nothing, and several trackers as one."""

from collections.abc import Iterable
from typing import Protocol, runtime_checkable

from distgrow.tracking.base_event import Line


class Tracker(Protocol):
    """Take a run's events: each is a flat mapping with `event`, `step`, `samples`, `time_s` and keys of its own.

    `distgrow.tracking.events` has a class for each kind, with all its keys.
    """

    def log(self, event: Line) -> None:
        """Take an event; called on the first rank, between updates."""
        ...

    def close(self) -> None:
        """Release what is held, at the end of the run."""
        ...


@runtime_checkable
class Buffered(Protocol):
    """A tracker that keeps events in memory for a while."""

    def flush(self) -> None:
        """Write them now."""
        ...


class NullTracker:
    """Keep nothing: for all ranks but the first."""

    def log(self, event: Line) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


class Trackers:
    """Hand events to several trackers."""

    def __init__(self, trackers: Iterable[Tracker]) -> None:
        self._trackers = list(trackers)

    def log(self, event: Line) -> None:
        """Log to all."""
        for tracker in self._trackers:
            tracker.log(event)

    def flush(self) -> None:
        """Make those that keep events in memory write them."""
        for tracker in self._trackers:
            if isinstance(tracker, Buffered):
                tracker.flush()

    def close(self) -> None:
        """Close all."""
        for tracker in self._trackers:
            tracker.close()
