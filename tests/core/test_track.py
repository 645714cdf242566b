"""What is logged can be read again, whatever happened to the file; what is shown is one line, or plain ones."""

import io
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distgrow.core.errors import RunError
from distgrow.core.plan import Plan
from distgrow.core.progress import Ledger, Outcome, Progress
from distgrow.tracking.base import Trackers
from distgrow.tracking.base_event import Event
from distgrow.tracking.event_log import EventLog
from distgrow.tracking.events import Checkpoint, Evaluation, Resume
from distgrow.tracking.jsonl import JSONL
from distgrow.tracking.pace import SmoothedRate, duration, standing
from distgrow.tracking.read import history, last_total, read_events
from distgrow.tracking.terminal import Terminal, doing_of, standing_of
from distgrow.tracking.update_event import update_event

PLAN = Plan(batch=256, world=2, micro=64, accum=2, lr=0.28284271247, stage=3)


def update(events: EventLog, number: int) -> None:
    """Log the update `number`."""
    progress = Progress(step=number, samples=256 * number, stage=3, ledger=Ledger(applied=256 * number))
    events.update(progress, PLAN, Outcome(loss=0.5, grad_norm=1.0), epoch=1437, samples_per_s=1000.0)


def step(number: int = 7, loss: float = 0.125, rate: float = 1000.0) -> dict[str, Any]:
    """The step line after `number` updates of PLAN."""
    ledger = Ledger(applied=256 * number, skipped=256, replayed=512)
    progress = Progress(step=number, samples=256 * (number + 1), stage=3, ledger=ledger)
    outcome = Outcome(loss=loss, grad_norm=math.inf)
    return update_event(progress, PLAN, outcome, epoch=1437, time_s=1.5, samples_per_s=rate).to_json()


floats = st.floats(allow_nan=False, allow_infinity=False)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.dictionaries(st.sampled_from("abc"), st.none() | floats | st.text(max_size=5)), max_size=5))
def test_every_number_is_read_as_it_was_logged(tmp_path_factory: pytest.TempPathFactory, rows: list[Any]) -> None:
    path = tmp_path_factory.mktemp("log") / "metrics.jsonl"
    logged = [{"event": "eval", "step": k, "samples": 8 * k, "time_s": 0.5, **row} for k, row in enumerate(rows)]
    tracker = JSONL(path)
    for event in logged:
        tracker.log(event)
    tracker.close()
    assert [event.to_json() for event in read_events(path)] == logged


def test_events_are_in_the_file_in_the_order_in_which_they_were_made(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    events = EventLog(Trackers([JSONL(path)]))
    for number in range(1, 6):
        update(events, number)
    events.log(Checkpoint(step=5, samples=40, time_s=1.0))
    found = [(event.kind, event.step) for event in read_events(path)]
    assert found == [*(("step", number) for number in range(1, 6)), ("checkpoint", 5)]


def test_updates_that_wait_are_in_the_file_once_written(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    events = EventLog(JSONL(path))
    for number in range(1, 6):
        update(events, number)
    assert len(list(read_events(path))) < 5  # the first alone was due
    events.flush()
    assert [event.step for event in read_events(path)] == [1, 2, 3, 4, 5]
    events.flush()
    assert len(list(read_events(path))) == 5


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 450))
def test_a_file_torn_anywhere_goes_on_with_whole_lines(tmp_path_factory: pytest.TempPathFactory, size: int) -> None:
    path = tmp_path_factory.mktemp("torn") / "metrics.jsonl"
    before = [Evaluation(step=k, samples=k, time_s=1.0, more={"note": "ε" * 30}).to_json() for k in range(4)]
    content = "".join(json.dumps(event, ensure_ascii=False) + "\n" for event in before).encode()
    path.write_bytes(content[:size])
    whole = content[:size].count(b"\n")
    tracker = JSONL(path)
    resume = Resume(step=1, samples=1, time_s=1.0).to_json()
    tracker.log(resume)
    tracker.close()
    assert [event.to_json() for event in read_events(path)] == [*before[:whole], resume]


def test_no_number_that_json_lacks_is_written() -> None:
    event = step(loss=math.nan)
    assert event["loss"] is None
    assert event["grad_norm"] is None
    assert json.loads(json.dumps(event, allow_nan=False)) == event


def test_the_total_that_a_crash_had_reached_is_the_largest_logged(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert last_total(read_events(path)) == 0
    tracker = JSONL(path)
    for number in (5, 6, 2):
        tracker.log(step(number))
    tracker.close()
    assert last_total(read_events(path)) == 256 * 6 + 256 + 512


def test_a_damaged_line_is_named_with_its_file(tmp_path: Path) -> None:
    good = json.dumps(Checkpoint(step=2, samples=16, time_s=1.0).to_json())
    (tmp_path / "metrics.jsonl").write_text(f'{good}\n{{"event": sta\n')
    with pytest.raises(RunError, match=r"metrics.jsonl:2 is damaged: the line '{\"event\": sta' is not JSON"):
        list(read_events(tmp_path / "metrics.jsonl"))


def test_history_leaves_out_what_a_resume_went_back_over() -> None:
    events: list[Event] = [Evaluation(step=k // 8, samples=k, time_s=1.0) for k in (8, 16, 24)]
    events += [Resume(step=1, samples=8, time_s=1.0), Evaluation(step=2, samples=16, time_s=2.0)]
    assert [event.samples for event in history(events)] == [8, 8, 16]


def test_a_step_is_shown_with_what_is_left_first() -> None:
    line = standing_of(step(), 256 * 7 + 90_000, 359, 1000.0)
    assert line == "1 % · 7/359 · 1,000 samples/s · 1 min 30 s left"
    assert standing_of(step(), 256 * 7, None, None) == "100 % · 7 · 0 samples/s · unknown time left"
    assert doing_of(step()) == "loss 0.1250 · batch 256 · lr 0.283 · stage 3"
    assert doing_of({**step(loss=math.inf), "grad_norm": 1.0}).startswith("loss not finite")
    assert doing_of(step(loss=math.nan)).startswith("loss not known yet")  # no gradient has come


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0, "0 s"), (59.4, "59 s"), (59.6, "1 min"), (90, "1 min 30 s"), (3599.9, "1 h"), (3600 + 59 * 60 + 40, "2 h")]
    + [(12_000, "3 h 20 min"), (86_400 * 2 + 3600 * 4, "2 d 4 h"), (86_399, "1 d"), (-3.0, "0 s")],
)
def test_a_time_is_shown_in_its_two_largest_units(seconds: float, shown: str) -> None:
    assert duration(seconds) == shown


def test_the_rate_is_that_of_the_last_minute_and_begins_anew_where_a_resume_went_back() -> None:
    rate = SmoothedRate()
    assert rate.samples_per_s() is None
    for second in range(200):  # 10 a second, then 40
        rate.add(10 * second if second < 100 else 1000 + 40 * (second - 100), float(second))
    assert rate.samples_per_s() == pytest.approx(40)
    rate.add(1000, 201.0)
    assert rate.samples_per_s() is None
    assert standing(380, 1000, 31.0) == "38 %, 20 s left"
    assert standing(380, None, 31.0) == ""


START = {"event": "start", "step": 0, "samples": 0, "sfo": 0, "time_s": 0.0}
END = {"event": "end", "reason": "done", "step": 100, "sfo": 25600, "time_s": 3.0}


def run_shown(terminal: Terminal) -> None:
    """A run of 100 updates."""
    shape = {"batch": 256, "world": 2, "micro": 64, "accum": 2, "lr": 0.28}
    terminal.log({**START, "dir": "runs/x", "world": 2, "budget_samples": 25_600})
    terminal.log({"event": "stage", "stage": 3, "epoch": 1.5, **shape})
    for number in range(100):
        terminal.log(step(number + 1))
    terminal.log({"event": "eval", "step": 100, "samples": 1, "time_s": 1.0, "epoch": 2.0, "accuracy": 0.5})
    terminal.log(END)
    terminal.close()


def test_where_there_is_no_terminal_plain_lines_tell_of_the_run() -> None:
    stream = io.StringIO()
    run_shown(Terminal(25_600, 100, stream))
    lines = stream.getvalue().splitlines()
    assert "\x1b" not in stream.getvalue()
    assert [line.split(":")[0].split(" ·")[0] for line in lines] == [
        "run runs/x",
        "stage 3",
        "1 %",
        "epoch 2.0",
        "done",
    ]


@pytest.mark.parametrize("width", [60, 80, 120])
def test_on_a_terminal_the_time_left_is_seen_at_any_width_and_no_bar_stays(
    width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Screen(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("distgrow.tracking.terminal.LIVE_S", 0.0)
    stream = Screen()
    run_shown(Terminal(25_600, 100, stream))
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())
    bars = [line for line in re.split(r"[\r\n]", plain) if "━" in line]
    assert bars
    assert all(len(line) <= width for line in bars)
    assert any(re.search(r"100 % · 100/100 · [\d,]+( samples)?/s · 0 s left", line) for line in bars)
    assert plain.splitlines()[-1] == "done: 100 updates, 25,600 gradient evaluations, 3.0 s"


def test_the_last_update_of_a_run_that_breaks_off_is_left_as_a_line() -> None:
    stream = io.StringIO()
    terminal = Terminal(25_600, 100, stream)
    for number in range(3):
        terminal.log(step(number + 1))
    terminal.close()
    assert [line.split(" · ")[1] for line in stream.getvalue().splitlines()] == ["1/100", "3/100"]


def test_a_tracker_that_does_not_say_it_may_wait_has_each_update_before_the_next(tmp_path: Path) -> None:
    class Prompt:
        """A tracker of a user's own, which may look at the model when it is called."""

        def __init__(self) -> None:
            self.steps: list[int] = []

        def log(self, event: Any) -> None:
            self.steps.append(event["step"])

        def close(self) -> None:
            """Nothing is held."""

    prompt = Prompt()
    events = EventLog(Trackers([JSONL(tmp_path / "metrics.jsonl"), prompt]))
    for number in range(1, 6):
        update(events, number)
        assert prompt.steps[-1] == number
