"""A run whose lines were altered is a report or a damaged line with its file and number, never a traceback."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from scripted import Script
from test_events import EVENTS

from distgrow.core.errors import ConfigError
from distgrow.planning.forecast import foresee
from distgrow.report.page import page
from distgrow.report.plots import draw
from distgrow.report.runs import read
from distgrow.tracking.base_event import Event

Lines = list[dict[str, Any]]
VALUES = [None, "x", "", [1], {}, True, 0, -1, 0.5, 1e-300, 1e299, 2**62, 10**400, math.inf, -math.inf, math.nan]
CONFIG = (
    "growth: {kind: exponential, start: 8, factor: 2, cap: 16}\nstages: {every: {samples: 16}}\nlr: {base: 0.05}\n"
    "budget: {samples: 800}\ntheory: {smoothness: 2.0, variance: 3.0, gap: 2.0, epsilon: 0.5}\n"
)


def lines() -> Lines:
    """A run with an event of every kind."""
    script = Script(samples_per_s=100.0).event("start", budget_samples=800).stage(0, 8, 8).updates(2.0, 1.0, 0.9)
    for event in EVENTS:
        script.events.append({**event.to_json(), "step": 3, "samples": 24, "sfo": 24, "time_s": 1.5})
    return script.stage(1, 16, 8).updates(0.5, 0.4).evaluate(accuracy=0.9, loss=0.5).end().events


def save(folder: Path, altered: Lines, config: str = CONFIG) -> str:
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(config)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in altered))
    return str(folder)


def altered(kind: str) -> Iterator[tuple[str, Any, Lines]]:
    """The run with each key of its last line of a kind set to each value."""
    index = max(number for number, line in enumerate(lines()) if line["event"] == kind)
    for key in lines()[index]:
        for value in VALUES:
            run = lines()
            run[index][key] = value
            yield key, value, run


def shown(run: str) -> str | None:
    """The page without plots; None if a line is damaged, which then is named."""
    try:
        records = read([run])
    except ConfigError as error:
        number = int(str(error).partition(f"{run}/metrics.jsonl:")[2].split()[0])
        assert f"{run}/metrics.jsonl:{number} is damaged: the line " in str(error)
        assert number <= len(lines())
        return None
    return page(records, {}, [foresee(record) for record in records], update_s=0.1)


@pytest.mark.parametrize("kind", sorted({event.kind for event in EVENTS}))
@pytest.mark.filterwarnings("error")
def test_any_value_in_any_key_is_shown_or_named(tmp_path: Path, kind: str) -> None:
    for key, value, run in altered(kind):
        folder = save(tmp_path / "run", run)
        try:
            page_or_none = shown(folder)
        except Exception as error:
            raise AssertionError(f"{kind}.{key}={value!r}") from error
        if isinstance(value, list | dict) and key in ("step", "samples", "time_s", "event", "sfo"):
            assert page_or_none is None, f"{kind}.{key}={value!r} was taken"


@pytest.mark.parametrize("value", [None, 0, 0.5, 1e299, 2**62], ids=repr)
@pytest.mark.filterwarnings("ignore:overflow")
def test_what_is_taken_can_be_drawn(tmp_path: Path, value: Any) -> None:
    run = lines()
    for kind in sorted({event.kind for event in EVENTS}):
        index = max(number for number, line in enumerate(lines()) if line["event"] == kind)
        for key in lines()[index].keys() - {"event", "step", "samples"}:
            changed = lines()
            changed[index][key] = value
            if shown(save(tmp_path / "one", changed)) is not None:
                run[index][key] = value
    draw(read([save(tmp_path / "all", run)]), "time_s").draw_without_rendering()


@pytest.mark.parametrize(
    "config",
    ["", "5", "a: [", "!!python/object/apply:os.system [true]", "x: !!int x", "x: 2026-13-45", "[" * 3000, "a: 0x_"]
    + ["growth: {kind: exponential, start: 8, factor: 2, cap: .inf}\nbudget: {samples: .nan}\n", "budget: [1]"]
    + ["growth: {kind: exponential, start: " + "9" * 5000 + "}\n", "theory: {smoothness: .inf}"],
    ids=lambda text: text[:30],
)
def test_any_config_is_shown_as_it_is(tmp_path: Path, config: str) -> None:
    text = shown(save(tmp_path / "run", lines(), config))
    assert text is not None
    assert "At a constant batch of 8" in text


def test_every_event_is_altered() -> None:
    kinds = {line["event"] for line in lines()}
    assert {event.kind for event in EVENTS if isinstance(event, Event)} == kinds
