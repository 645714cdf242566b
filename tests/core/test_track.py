"""What is logged can be read again, whatever happened to the file; what is shown is one line, or plain ones."""

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distgrow.core.errors import RunError
from distgrow.core.plan import Plan
from distgrow.core.progress import Ledger, Outcome, Progress
from distgrow.tracking.base_event import Event
from distgrow.tracking.events import Checkpoint, Evaluation, Resume, update_event
from distgrow.tracking.jsonl import JSONL
from distgrow.tracking.read import history, last_total, read_events
from distgrow.tracking.terminal import Terminal, step_line

PLAN = Plan(batch=256, world=2, micro=64, accum=2, lr=0.28284271247, stage=3)


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


def test_a_line_that_is_not_a_steps_is_on_the_disk_at_once(tmp_path: Path) -> None:
    tracker = JSONL(tmp_path / "metrics.jsonl")
    tracker.log(step(1))
    tracker.log(step(2))
    tracker.log(Checkpoint(step=2, samples=16, time_s=1.0).to_json())
    kinds = [event.kind for event in read_events(tmp_path / "metrics.jsonl")]
    tracker.close()
    assert kinds == ["step", "step", "checkpoint"]


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


def test_the_live_line_holds_what_the_run_is_doing() -> None:
    line = step_line(step(), budget=256 * 7 + 90_000)
    for part in ("stage 3", "batch 256 = 2 × 64 × 2", "lr 0.2828", "loss 0.1250", "sfo 2,560", "1,000 samples/s"):
        assert part in line
    assert line.endswith("0:01:30 left")
    assert "loss not finite" in step_line(step(loss=math.inf), budget=10)


@pytest.mark.parametrize(
    ("seconds", "shown"), [(59.6, "0:01:00"), (90, "0:01:30"), (3599.9, "1:00:00"), (0, "0:00:00")]
)
def test_the_time_left_is_in_hours_minutes_and_seconds(seconds: float, shown: str) -> None:
    assert step_line(step(), budget=256 * 7 + seconds * 1000).endswith(f" {shown} left")


def test_where_there_is_no_terminal_plain_lines_tell_of_the_run() -> None:
    stream = io.StringIO()
    terminal = Terminal(10_000, stream)
    shape = {"batch": 256, "world": 2, "micro": 64, "accum": 2, "lr": 0.28}
    terminal.log({"event": "start", "dir": "runs/x", "world": 2, "budget_samples": 10_000})
    terminal.log({"event": "stage", "stage": 3, "epoch": 1.5, **shape})
    for number in range(100):
        terminal.log(step(number + 1))
    terminal.log({"event": "eval", "step": 100, "samples": 1, "time_s": 1.0, "epoch": 2.0, "accuracy": 0.5})
    terminal.log({"event": "end", "reason": "done", "step": 100, "sfo": 25600, "time_s": 3.0})
    terminal.close()
    lines = stream.getvalue().splitlines()
    assert "\x1b" not in stream.getvalue()
    assert [line.split(":")[0].split(" ·")[0] for line in lines] == [
        "run runs/x",
        "stage 3",
        "stage 3",
        "epoch 2.0",
        "done",
    ]
