"""A run's lines read as they are written are those read at once, and those of the run as if it had never crashed."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scripted import PARTS, Script, crashed, short

from distgrow.core.errors import RunError
from distgrow.report.log import COLUMNS, Log
from distgrow.tracking.read import history, read_events


def eventful() -> Script:
    """Skips, a crash that goes back over one of them, and an out-of-memory retry."""
    script = Script().event("start").stage(0, 8, 8).updates(2.0, 1.0).skip().updates(0.9)
    script.sfo["discarded"] = 8
    script.event("oom", micro=8, sfo_discarded=8).updates(0.8, None).skip().updates(0.7)
    script.step, script.samples = 5, 48
    script.sfo = {**dict.fromkeys(PARTS, 0), "applied": 40, "skipped": 8, "discarded": 8, "replayed": 16}
    script.event("resume", checkpoint="step-00000005", sfo_replayed=16).stage(0, 8, 8).updates(0.6)
    return script.stage(1, 16, 8).updates(0.5, 0.4).evaluate(accuracy=1.0).end()


def told(log: Log) -> tuple[object, ...]:
    """All that a log has to tell."""
    steps = {key: np.nan_to_num(column, nan=-1.0).tolist() for key, column in log.steps().items()}
    return steps, log.events(), log.ledger(), log.last()


@given(cuts=st.lists(st.integers(0, 10_000), max_size=12))
def test_reading_in_any_pieces_gives_what_reading_at_once_gives(
    cuts: list[int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("run") / "metrics.jsonl"
    content = "".join(json.dumps(event) + "\n" for event in eventful().events).encode()
    piecewise = Log(path)
    for end in sorted({min(cut, len(content)) for cut in cuts} | {len(content)}):
        path.write_bytes(content[:end])
        piecewise.advance()
    whole = Log(path)
    assert whole.advance()
    assert told(piecewise) == told(whole)
    assert not piecewise.advance()


@pytest.mark.parametrize("script", [short(), crashed(), eventful()])
def test_what_is_kept_is_the_history_of_the_run(tmp_path: Path, script: Script) -> None:
    path = Path(script.save(tmp_path / "run")) / "metrics.jsonl"
    log = Log(path)
    log.advance()
    kept = [event.to_json() for event in history(read_events(path))]
    steps = [event for event in kept if event["event"] == "step"]
    for key in set(COLUMNS) & set(steps[0]):
        expected = [np.nan if step[key] is None else step[key] for step in steps]
        np.testing.assert_array_equal(log.steps()[key], expected)
    assert [(event.kind, event.samples) for event in log.events()] == [
        (event["event"], event["samples"]) for event in kept if event["event"] != "step"
    ]
    assert {part: getattr(log.ledger(), part) for part in PARTS} == script.sfo


def test_a_file_that_was_replaced_by_another_is_read_from_its_beginning(tmp_path: Path) -> None:
    path = Path(eventful().save(tmp_path / "run")) / "metrics.jsonl"
    log, other = Log(path), Path(short().save(tmp_path / "other")) / "metrics.jsonl"
    log.advance()
    other.replace(path)
    assert log.advance()
    assert len(log) == 5
    path.write_text("")
    log.advance()
    assert len(log) == 0
    assert log.last() is None


@pytest.mark.parametrize("value", ['"2.0"', "[1]", "{}", "1e400", "-Infinity"])
@pytest.mark.parametrize("kind", ["step", "eval"])
def test_what_is_no_number_is_a_damaged_line_until_it_is_repaired(tmp_path: Path, value: str, kind: str) -> None:
    path = Path(short().save(tmp_path / "run")) / "metrics.jsonl"
    good = path.read_text()
    lines = good.splitlines()
    chosen = next(index for index, line in enumerate(lines) if f'"{kind}"' in line)
    event = json.loads(lines[chosen])
    lines[chosen] = json.dumps({**event, "samples": "VALUE"}).replace('"VALUE"', value)
    path.write_text("\n".join([*lines, ""]))
    log = Log(path)
    for _ in range(2):
        with pytest.raises(
            RunError, match="is damaged: the line .* holds samples=.*, which must be a whole number .*; repair"
        ):
            log.advance()
    path.write_text(good)
    assert log.advance()
    assert len(log) == 5
