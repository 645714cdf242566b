"""The protocol of trackers, a tracker that keeps nothing, and several trackers as one."""

from collections.abc import Iterable, Sequence
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
class File(Protocol):
    """A tracker that writes several events at once, and to the disk itself if asked."""

    def log_all(self, events: Sequence[Line]) -> None:
        """Take events, in order."""
        ...

    def flush(self) -> None:
        """Write what has been taken to the disk itself."""
        ...


def log_all(tracker: Tracker, events: Sequence[Line]) -> None:
    """Hand events to a tracker, in order."""
    if isinstance(tracker, File):
        tracker.log_all(events)
        return
    for event in events:
        tracker.log(event)


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

    def log_all(self, events: Sequence[Line]) -> None:
        """Log several to each."""
        for tracker in self._trackers:
            log_all(tracker, events)

    def flush(self) -> None:
        """Make those that are files write to the disk itself."""
        for tracker in self._trackers:
            if isinstance(tracker, File):
                tracker.flush()

    def close(self) -> None:
        """Close all."""
        for tracker in self._trackers:
            tracker.close()
