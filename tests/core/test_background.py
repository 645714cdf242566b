"""A service that is slow, fails or never comes back takes nothing from a run but what is told of it."""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest

from distgrow.tracking.background import BackgroundTracker, point_of
from distgrow.tracking.spec import Ending, Point


def step(number: int, **values: Any) -> dict[str, Any]:
    """A step line."""
    return {"event": "step", "step": number, "loss": 0.5, "grad_sq": None, **values}


class Kept:
    """A service that keeps what it gets, and fails as often as it is told to."""

    def __init__(self, fails: int = 0) -> None:
        self.seen: Mapping[str, int] = {}
        self.fails, self.steps, self.ending = fails, list[int](), ""
        self.arrived = threading.Condition()

    def publish(self, points: Sequence[Point]) -> None:
        with self.arrived:
            self.fails -= 1
            self.arrived.notify_all()
            if self.fails >= 0:
                raise ConnectionError("no route")
            self.steps += [point.step for point in points]

    def finish(self, ending: Ending) -> None:
        self.ending = ending

    def wait(self, condition: Callable[[], bool]) -> None:
        with self.arrived:
            assert self.arrived.wait_for(condition, 20)


def behind(service: Kept) -> BackgroundTracker:
    return BackgroundTracker("fake", lambda: service, retry_s=0.01)


def test_everything_arrives_in_order_before_the_end() -> None:
    service = Kept()
    tracker = behind(service)
    for number in range(350):
        tracker.log(step(number))
    tracker.log({"event": "end", "step": 350, "reason": "done"})
    tracker.close()
    assert service.steps == list(range(350))
    assert service.ending == "done"


@pytest.mark.parametrize(
    ("reason", "ending"), [("done", "done"), ("stopped on request", "stopped"), ("too many updates …", "failed")]
)
def test_a_service_is_told_how_the_run_ended(reason: str, ending: str) -> None:
    service = Kept()
    tracker = behind(service)
    tracker.log({"event": "end", "step": 1, "reason": reason})
    tracker.close()
    assert service.ending == ending


def test_a_run_that_ends_without_a_word_has_failed() -> None:
    service = Kept()
    behind(service).close()
    assert service.ending == "failed"


def test_what_a_failing_service_missed_is_sent_again_and_told_once(capfd: pytest.CaptureFixture[str]) -> None:
    service = Kept(fails=3)
    tracker = behind(service)
    tracker.log(step(1))
    service.wait(lambda: service.fails < 0)
    tracker.log(step(2))
    tracker.close()
    assert service.steps == [1, 2]
    told = capfd.readouterr().err.splitlines()
    assert told == ["run.trackers: fake fails: no route; the run goes on, and it is tried again every 0.01 s"]


def test_what_never_arrives_is_told_at_the_end(capfd: pytest.CaptureFixture[str]) -> None:
    tracker = behind(Kept(fails=10**9))
    for number in range(7):
        tracker.log(step(number))
    tracker.close()
    last = capfd.readouterr().err.splitlines()[-1]
    assert last == (
        "run.trackers: fake has not taken 7 points, which metrics.jsonl holds; the run is not touched by it"
    )


def test_a_service_that_hangs_does_not_hold_up_the_run() -> None:
    release = threading.Event()

    class Hanging(Kept):
        def publish(self, points: Sequence[Point]) -> None:
            release.wait(20)
            super().publish(points)

    service = Hanging()
    tracker = behind(service)
    for number in range(50):
        tracker.log(step(number))
    assert service.steps == []
    release.set()
    tracker.close()
    assert service.steps == list(range(50))


def test_an_update_is_sent_once_whatever_is_made_again() -> None:
    service = Kept()
    service.seen = {"step": 3, "eval": 0}
    tracker = BackgroundTracker("fake", lambda: service, [step(number) for number in (2, 3)], retry_s=0.01)
    for number in (3, 4, 5, 4, 5, 6):
        tracker.log(step(number))
    tracker.log({**step(2), "event": "eval"})
    tracker.close()
    assert service.steps == [4, 5, 6, 2]


def test_a_service_that_is_opened_late_gets_what_it_has_not(capfd: pytest.CaptureFixture[str]) -> None:
    service, away = Kept(), [ConnectionError("not yet")] * 3
    service.seen = {"step": 299}

    def opened() -> Kept:
        if away:
            raise away.pop()
        return service

    tracker = BackgroundTracker("fake", opened, [step(number) for number in range(350)], retry_s=0.01)
    assert tracker.opened() is not None
    for number in range(350, 360):
        tracker.log(step(number))
    service.wait(lambda: len(service.steps) == 60)
    tracker.close()
    assert service.steps == list(range(300, 360))
    assert "not yet" in capfd.readouterr().err


def test_a_past_longer_than_the_queue_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distgrow.tracking.background.WAITING", 20)
    service = Kept()
    tracker = BackgroundTracker("fake", lambda: service, [step(number) for number in range(500)], retry_s=0.01)
    for number in range(500, 515):
        tracker.log(step(number))
    tracker.close()
    assert service.steps == list(range(515))


def test_a_point_holds_the_numbers_of_its_event() -> None:
    point = point_of(step(3, batch=16, note="x", whole=True))
    assert point is not None
    assert dict(point.figures) == {"step": 3.0, "loss": 0.5, "batch": 16.0}
    assert (point.kind, point.step) == ("step", 3)
    assert abs(point.time_s - time.time()) < 60
    assert point_of({"event": "checkpoint", "step": 3}) is None
