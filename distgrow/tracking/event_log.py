"""EventLog: gives a run's events their place and hands them to the trackers."""

import time

from distgrow.core.plan import Plan
from distgrow.core.progress import Outcome, Progress
from distgrow.tracking.base import Buffered, Tracker, log_all, may_wait
from distgrow.tracking.base_event import Event, Place
from distgrow.tracking.update_event import update_event

#: Seconds that the event of an update waits for the next one, at most.
LATEST_S = 0.1


class EventLog:
    """Log the events of one run."""

    def __init__(self, tracker: Tracker) -> None:
        self.tracker = tracker
        self._waiting: list[tuple[Progress, Plan, Outcome, int, float, float, float | None]] = []  # see update_event
        self._due = 0.0
        self.mfu_of_token: float | None = None  #: share of the devices' peak that one token a second takes, if known
        self.began = time.monotonic()  #: when the run would have begun if it had never been interrupted

    def seconds(self) -> float:
        """Return the seconds that the run has taken."""
        return time.monotonic() - self.began

    def place(self, progress: Progress) -> Place:
        """Return what every event has, now that `progress` has been made."""
        return Place(step=progress.step, samples=progress.samples, sfo=progress.ledger.total, time_s=self.seconds())

    def log(self, event: Event) -> None:
        """Hand the event to the trackers, after the updates that wait."""
        self.write()
        self.tracker.log(event.to_json())

    def update(self, progress: Progress, plan: Plan, outcome: Outcome, *, epoch: int, samples_per_s: float) -> None:
        """Hand an update's event to the trackers; if all of them may wait, up to LATEST_S later, with the next ones.

        An update may take a few hundred microseconds, and events are cheaper to make and write together.
        """
        now = time.monotonic()
        self._waiting.append((progress, plan, outcome, epoch, now - self.began, samples_per_s, self.mfu_of_token))
        if now >= self._due or not may_wait(self.tracker):
            self.write()

    def write(self) -> None:
        """Hand the updates that wait to the trackers."""
        if self._waiting:
            log_all(self.tracker, [update_event(*update).to_json() for update in self._waiting])
            self._waiting.clear()
        self._due = time.monotonic() + LATEST_S

    def flush(self) -> None:
        """Write every event to the disk itself, so that killing this process loses none."""
        self.write()
        if isinstance(self.tracker, Buffered):
            self.tracker.flush()
