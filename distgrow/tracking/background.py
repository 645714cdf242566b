"""BackgroundTracker: reports to a service from a thread of its own, so that no service can hold up training."""

import queue
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from itertools import islice

from distgrow.tracking.base_event import Line
from distgrow.tracking.events import End
from distgrow.tracking.fields import shown_number
from distgrow.tracking.spec import KINDS, Ending, Point, Service

#: Seconds between two attempts at a service that fails.
RETRY_S = 10.0
#: Seconds that a new run waits for a service to be opened, at most.
OPENING_S = 30.0
#: Seconds that the end of a run waits for a service, at most.
CLOSING_S = 60.0
#: Events that wait for a service, at most; beyond that new ones are not sent.
WAITING = 100_000
#: Points that are sent at once, at most.
TOGETHER = 100

#: How services call the reasons of an `end` event; any other is a failure.
_ENDINGS: Mapping[str, Ending] = {"done": "done", "stopped on request": "stopped"}


class BackgroundTracker:
    """Report to a service: failures are printed on stderr and tried again; metrics.jsonl has what never arrives.

    The thread opens the service, too. Of each kind of event an update is sent once: what a resumed run goes over again
    is left out.

    Args:
        name: the service, for messages.
        open: opens the run at the service.
        past: the run's events before this process; the service gets those that it lacks.
        retry_s: seconds between two attempts.
    """

    waits = True

    def __init__(
        self,
        name: str,
        open: Callable[[], Service],
        past: Iterable[Line] = (),
        *,
        retry_s: float = RETRY_S,
    ) -> None:
        self._name, self._open, self._retry_s = name, open, retry_s
        self._service: Service | None = None
        self._past = deque(point for event in past if (point := point_of(event)) is not None)
        self._points: queue.Queue[Point] = queue.Queue(WAITING)
        self._last = {point.kind: point.step for point in self._past}
        self._lost, self._message, self._failure = 0, "", ""
        self._ending: Ending = "failed"
        self._closing, self._tried = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._send, name=f"tracker {name}", daemon=True)
        self._thread.start()

    def opened(self) -> str | None:
        """Wait until the service has been tried; return why it is not open, or None if it is."""
        if not self._tried.wait(OPENING_S):
            return f"no answer in {OPENING_S:g} s"
        return None if self._service is not None else self._failure

    def log(self, event: Line) -> None:
        """Hand the event's numbers over, at once."""
        if event["event"] == End.kind:
            self._ending = _ENDINGS.get(event["reason"], "failed")
        point = point_of(event)
        if point is None or point.step <= self._last.get(point.kind, -1):
            return
        self._last[point.kind] = point.step
        try:
            self._points.put_nowait(point)
        except queue.Full:
            self._lost += 1

    def close(self) -> None:
        """Wait for the service to take what is left, a minute at most; print what it has not taken."""
        self._closing.set()
        self._thread.join(CLOSING_S)
        missing = self._waiting() + self._lost
        if self._thread.is_alive() or missing:
            self._print(f"has not taken {missing} points, which metrics.jsonl holds; the run is not touched by it")

    def _waiting(self) -> int:
        return len(self._past) + self._points.qsize()

    def _send(self) -> None:
        self._attempt(lambda service: None)
        self._tried.set()
        while self._wait() or self._waiting():
            if not self._deliver() and self._closing.wait(self._retry_s):
                self._deliver()
                break
        if self._service is not None:
            self._attempt(lambda service: service.finish(self._ending))

    def _wait(self) -> bool:
        """Wait a moment if there is nothing to send; return whether the run goes on."""
        if not self._waiting():
            self._closing.wait(0.2)
        return not self._closing.is_set()

    def _deliver(self) -> bool:
        """Send all that waits; return whether that went well."""
        while waiting := self._next():
            if not self._attempt(lambda service, points=waiting: service.publish(_unseen(service, points))):
                return False
            for _ in waiting:
                _ = self._past.popleft() if self._past else self._points.get_nowait()
        return True

    def _next(self) -> list[Point]:
        """Return the points to send next; they stay in the queue until the service has taken them."""
        if self._past:
            return list(islice(self._past, TOGETHER))
        with self._points.mutex:
            return list(islice(self._points.queue, TOGETHER))

    def _attempt(self, action: Callable[[Service], None]) -> bool:
        try:
            self._service = self._service or self._open()
            action(self._service)
            return True
        except Exception as error:  # whatever a service's client raises: it must not end the run
            self._failure = str(error)
            if self._tried.is_set():
                self._print(f"fails: {error}; the run goes on, and it is tried again every {self._retry_s:g} s")
            return False

    def _print(self, message: str) -> None:
        if message != self._message:
            self._message = message
            print(f"run.trackers: {self._name} {message}", file=sys.stderr, flush=True)


def _unseen(service: Service, points: list[Point]) -> list[Point]:
    return [point for point in points if point.step > service.seen.get(point.kind, -1)]


def point_of(event: Line) -> Point | None:
    """Return the numbers of an event that services show, or None if it is of another kind."""
    kind = event["event"]
    if kind not in KINDS:
        return None
    numbers = {name: number for name, value in event.items() if (number := shown_number(value)) is not None}
    figures = {name: float(number) for name, number in numbers.items()}
    return Point(kind=kind, step=event["step"], time_s=time.time(), figures=figures)
