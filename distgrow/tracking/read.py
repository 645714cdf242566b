"""Reads metrics.jsonl back as events, and says which line is damaged."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from distgrow.core.errors import RunError
from distgrow.run.folder import storing
from distgrow.tracking.base_event import Event
from distgrow.tracking.events import RateChoice, Resume, from_json


def read_events(path: Path) -> Iterator[Event]:
    """Yield the events of all whole lines of a metrics.jsonl; none if there is no such file.

    Raises:
        RunError: a line is damaged.
    """
    if not path.exists():
        return
    with storing(path), path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, start=1):
            if line.endswith("\n"):
                yield read_line(line.strip(), path, number)


def read_line(line: str, path: Path, number: int) -> Event:
    """Return the event of one line.

    Raises:
        RunError: the line is damaged.
    """
    fault = "is not JSON"
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        raise damaged(path, number, line, fault) from None
    return checked(values, path, number)


def checked(values: Any, path: Path, number: int) -> Event:
    """Return the event of one line that is JSON.

    Raises:
        RunError: the line is damaged.
    """
    try:
        return from_json(values)
    except ValueError as error:
        raise damaged(path, number, json.dumps(values), str(error)) from None


def damaged(path: Path, number: int, line: str, fault: str) -> RunError:
    """Return the error of a damaged line."""
    shown = line if len(line) <= 80 else line[:80] + " …"
    return RunError(f"{path}:{number} is damaged: the line {shown!r} {fault}; repair or remove that line")


def history(events: Iterable[Event]) -> list[Event]:
    """Return the events of the run as if it had never crashed: without those that a resume went back over."""
    kept: list[Event] = []
    for event in events:
        if isinstance(event, Resume):
            kept = [old for old in kept if old.samples <= event.samples]
        kept.append(event)
    return kept


def chosen_rate(events: Iterable[Event]) -> RateChoice | None:
    """Return the measurement of `lr.base: auto` that the run goes by; None: it has made none."""
    return next((event for event in reversed(list(events)) if isinstance(event, RateChoice)), None)


def last_total(events: Iterable[Event]) -> int:
    """Return the largest SFO total that was logged: how far a crashed run had come."""
    return max((event.sfo or 0 for event in events), default=0)
