"""No sentence that users read has a count of 1 with a plural."""

import io
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distgrow.config.load import load
from distgrow.core.counted import counted
from distgrow.core.progress import Ledger, Progress
from distgrow.planning import table
from distgrow.tracking.events import End, Resize, Start
from distgrow.tracking.terminal import Terminal
from distgrow.training.result import Result

DIGITS = Path(__file__).parents[2] / "configs/digits.yaml"
#: A lone 1, and a word in the plural behind it.
FAULT = re.compile(r"(?<![\d.,])1 ([a-z]+ )?[a-z]{3,}s\b")
ONE = Progress(step=1, samples=1, ledger=Ledger(applied=1))


@given(st.integers(0, 10**9))
def test_only_one_is_singular(number: int) -> None:
    shown, noun = counted(number, "update").split(" ")
    assert int(shown.replace(",", "")) == number
    assert noun == ("update" if number == 1 else "updates")


@pytest.mark.parametrize(("shown", "words"), [("1", "1 branch"), ("1.0", "1.0 branches"), ("0", "0 branches")])
def test_a_shown_number_is_taken_as_it_is_read(shown: str, words: str) -> None:
    assert counted(shown, "branch") == words


def test_a_plan_of_one_stage_and_one_update_is_in_the_singular(capsys: pytest.CaptureFixture[str]) -> None:
    run = load(DIGITS, ["lr.base=0.1", "budget={samples: 1}", "growth={kind: constant, start: 1}", "stages={}"])
    assert table.show(run, 1, rows=10)
    out = capsys.readouterr().out
    assert "1 stage, 1 update, 1 gradient evaluation;" in out
    assert not FAULT.search(out)


def test_a_result_of_one_update_is_in_the_singular() -> None:
    shown = repr(Result(progress=ONE, metrics={}, finished=True, dir=Path("runs/one")))
    assert "1 update, 1 sample, 1 gradient evaluation" in shown


def test_the_terminal_tells_of_one_in_the_singular() -> None:
    out = io.StringIO()
    place: Any = {"samples": 1, "sfo": 1, "time_s": 1.0}
    terminal = Terminal(1, 1, out)
    for event in (
        Start(step=0, **place, dir="runs/one", world=1, budget_samples=1),
        Resize(step=1, **place, old=2, new=1, wanted=1, seconds=1.0),
        End(step=1, **place, reason="done"),
    ):
        terminal.log(event.to_json())
    terminal.close()
    assert "1 sample to go" in out.getvalue()
    assert "to 1 worker (" in out.getvalue()
    assert "1 update, 1 gradient evaluation" in out.getvalue()
    assert not FAULT.search(out.getvalue())
