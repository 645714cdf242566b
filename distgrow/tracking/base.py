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
class Buffered(Protocol):
    """A tracker that keeps events in memory for a while."""

    def flush(self) -> None:
        """Write them now, to the disk itself."""
        ...


@runtime_checkable
class Bulk(Protocol):
    """A tracker that takes several events at once, more cheaply than one by one."""

    def log_all(self, events: Sequence[Line]) -> None:
        """Take events, in order."""
        ...


def may_wait(tracker: Tracker) -> bool:
    """Return whether a tracker may be given updates a moment later: it says `waits = True`, as those of distgrow do.

    Any other tracker is called between one update and the next. It may look at the model then, or stop the run.
    """
    return getattr(tracker, "waits", False)


def log_all(tracker: Tracker, events: Sequence[Line]) -> None:
    """Hand events to a tracker, in order."""
    if isinstance(tracker, Bulk):
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
        self.waits = all(may_wait(tracker) for tracker in self._trackers)

    def log(self, event: Line) -> None:
        """Log to all."""
        for tracker in self._trackers:
            tracker.log(event)

    def log_all(self, events: Sequence[Line]) -> None:
        """Log several to each."""
        for tracker in self._trackers:
            log_all(tracker, events)

    def flush(self) -> None:
        """Make those that keep events in memory write them."""
        for tracker in self._trackers:
            if isinstance(tracker, Buffered):
                tracker.flush()

    def close(self) -> None:
        """Close all."""
        for tracker in self._trackers:
            tracker.close()
