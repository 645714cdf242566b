"""EventLog: gives a run's events their place and hands them to the trackers."""

import time

from distgrow.core.progress import Progress
from distgrow.tracking.base import Buffered, Tracker
from distgrow.tracking.base_event import Event, Place


class EventLog:
    """Log the events of one run."""

    def __init__(self, tracker: Tracker) -> None:
        self.tracker = tracker
        self.began = time.monotonic()  #: when the run would have begun if it had never been interrupted

    def seconds(self) -> float:
        """Return the seconds that the run has taken."""
        return time.monotonic() - self.began

    def place(self, progress: Progress) -> Place:
        """Return what every event has, now that `progress` has been made."""
        return Place(step=progress.step, samples=progress.samples, sfo=progress.ledger.total, time_s=self.seconds())

    def log(self, event: Event) -> None:
        """Hand the event to the trackers."""
        self.tracker.log(event.to_json())

    def flush(self) -> None:
        """Make trackers write the events that they keep in memory, so that killing this process loses none."""
        if isinstance(self.tracker, Buffered):
            self.tracker.flush()
