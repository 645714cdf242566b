"""Log: a run's metrics.jsonl as columns and events that grow as the file does; knows one file and draws nothing."""

import json
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import groupby, islice
from math import nan
from pathlib import Path
from types import NoneType
from typing import IO, Any

import numpy as np

from distgrow.core.errors import RunError
from distgrow.core.progress import Ledger
from distgrow.run.folder import storing
from distgrow.tracking.base_event import PARTS, Event, fields_of
from distgrow.tracking.events import Resume, Step
from distgrow.tracking.fields import LARGEST, above_zero, count, figure, positive
from distgrow.tracking.read import checked, read_line

Array = np.ndarray[Any, np.dtype[Any]]
Events = Sequence[Event]

_SPENT = tuple(f"sfo_{part}" for part in PARTS[1:])
#: What is kept of a step line.
COLUMNS = (
    *("step", "samples", "time_s", "sfo", "epoch", "stage", "batch", "lr", "loss", "grad_norm", "world"),
    *("noise_trace", "noise_scale", "samples_per_s", "tokens", "tokens_per_s", "mfu", "compute", "density"),
    *_SPENT,
)
_CHECKS = {name: check for name, check, _ in fields_of(Step) if name in COLUMNS}
_NEEDED = {"event", *(name for name, _, optional in fields_of(Step) if not optional)}
_LINES = 5_000  #: parsed in one go, which takes half as long as one by one


class Log:
    """Hold the lines of a run so far, as if it had never crashed: what a resume went back over is left out.

    Step lines, of which there may be millions, are columns of numbers (NaN for null); all others stay events, each
    with the SFO total at its time.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._begin()

    def _begin(self) -> None:
        self._offset, self._file, self._lines = 0, -1, 0
        self._columns = {key: array("d") for key in COLUMNS}
        self._events, self._after, self._spent = list[Event](), list[int](), list[Ledger]()
        self._dropped = 0  # samples drawn whose gradients came too late, up to the last line that shows it

    def advance(self) -> bool:
        """Read what was appended since the last call; return whether there was anything.

        A last line without its end waits for the next call. A file that was replaced is read from its beginning.

        Raises:
            RunError: a line is damaged; the next call reads the whole file again.
        """
        if not self.path.is_file():
            return False
        with storing(self.path), self.path.open("rb") as file:
            status = self.path.stat()
            if status.st_size < self._offset or self._file not in (-1, status.st_ino):
                self._begin()
            self._file, before = status.st_ino, self._offset
            file.seek(self._offset)
            try:
                for lines in _whole_lines(file):
                    self._take(lines)
                    self._offset += sum(map(len, lines))
            except RunError:
                self._begin()
                raise
        return self._offset > before

    def __len__(self) -> int:
        """Return how many step lines are kept."""
        return len(self._columns["step"])

    def steps(self) -> dict[str, Array]:
        """Return a copy of the columns."""
        return {key: np.array(column) for key, column in self._columns.items()}

    def events(self) -> list[Event]:
        """Return all lines but the step lines."""
        return list(self._events)

    def ledger(self) -> Ledger:
        """Return the ledger after the last line."""
        return self._spent[-1] if self._event_is_last() else self._ledger_of_steps()

    def last(self) -> Event | None:
        """Return the last line, of a step line only its place; None before the first."""
        if self._event_is_last():
            return self._events[-1]
        if not len(self):
            return None
        place = {key: self._columns[key][-1] for key in ("step", "samples", "sfo", "time_s")}
        return Event.from_json({"event": "step", **place})

    # ── taking lines ────────────────────────────────────────────────────────────────────────────────────────────────

    def _take(self, lines: list[bytes]) -> None:
        """Add lines to the columns and events."""
        rows = self._parsed([line.decode(errors="replace").strip() for line in lines])
        for steps, group in groupby(rows, _is_step):
            taken = list(group)
            if steps:
                self._append(taken)
            else:
                for number, row in enumerate(taken, start=self._lines + 1):
                    self._add(checked(row, self.path, number))
            self._lines += len(taken)

    def _parsed(self, texts: list[str]) -> list[Any]:
        try:
            rows = json.loads(f"[{','.join(texts)}]")
            if len(rows) == len(texts):
                return rows
        except (ValueError, RecursionError):
            pass
        for number, text in enumerate(texts, start=self._lines + 1):
            read_line(text, self.path, number)  # the damaged line is one of these
        return [json.loads(text) for text in texts]

    def _append(self, rows: list[dict[str, Any]]) -> None:
        """Add step lines to the columns; what is not plain is checked line by line."""
        columns = _plain(rows)
        if columns is None:
            steps = [checked(row, self.path, number) for number, row in enumerate(rows, start=self._lines + 1)]
            columns = {key: [_or_nan(getattr(step, key)) for step in steps] for key in COLUMNS}
        ledger = self.ledger()
        for key in COLUMNS:
            values = np.asarray(columns.get(key, [nan] * len(rows)), dtype=float)
            if key in _SPENT:  # lines of earlier versions lack the ledger's parts
                values = np.where(np.isnan(values), getattr(ledger, key.removeprefix("sfo_")), values)
            self._columns[key].frombytes(values.tobytes())
        self._see_dropped(rows[-1])

    def _see_dropped(self, line: Mapping[str, Any]) -> None:
        """Take note of how many samples up to a line were neither applied nor skipped."""
        applied, skipped = line.get("sfo_applied"), line.get("sfo_skipped")
        if isinstance(applied, int) and isinstance(skipped, int):
            self._dropped = max(0, line["samples"] - applied - skipped)

    def _add(self, event: Event) -> None:
        if isinstance(event, Resume):
            self._go_back(event.samples)
        before = self.ledger()
        line = event.to_json()
        self._see_dropped(line)
        parts = {part: line.get(f"sfo_{part}", getattr(before, part)) for part in PARTS[1:]}
        ledger = Ledger(**parts, applied=max(0, event.samples - parts["skipped"] - self._dropped))
        self._events.append(event if event.sfo is not None else replace(event, sfo=ledger.total))
        self._after.append(len(self))
        self._spent.append(ledger)

    def _go_back(self, samples: int) -> None:
        kept = bisect_right(self._columns["samples"], samples)
        for column in self._columns.values():
            del column[kept:]
        remain = [index for index, event in enumerate(self._events) if event.samples <= samples]
        self._events = [self._events[index] for index in remain]
        self._after = [self._after[index] for index in remain]
        self._spent = [self._spent[index] for index in remain]

    def _event_is_last(self) -> bool:
        return bool(self._events) and self._after[-1] >= len(self)

    def _ledger_of_steps(self) -> Ledger:
        """Return the ledger after the last step line.

        Not every update has a line (run.log_every), but every line has `samples`: applied, skipped or dropped.
        """
        if not len(self):
            return Ledger()
        parts = {part: int(self._columns[f"sfo_{part}"][-1]) for part in PARTS[1:]}
        return Ledger(**parts, applied=max(0, int(self._columns["samples"][-1]) - parts["skipped"] - self._dropped))


def _is_step(row: Any) -> bool:
    return isinstance(row, dict) and row.get("event") == "step"


def _whole_lines(file: IO[bytes]) -> Iterator[list[bytes]]:
    """Yield the lines that have their end, many at a time."""
    while lines := list(islice(file, _LINES)):
        if not lines[-1].endswith(b"\n"):
            lines.pop()
        if not lines:
            return
        yield lines


def _plain(rows: list[dict[str, Any]]) -> dict[str, Array] | None:
    """Return the columns of step lines with the same keys if they hold nothing that a Step refuses, else None."""
    keys = rows[0].keys()
    if not keys >= _NEEDED or any(row.keys() != keys for row in rows):
        return None
    columns: dict[str, Array] = {}
    for key in keys & _CHECKS.keys():
        values = [row[key] for row in rows]
        kinds = {*map(type, values)}
        try:
            column = np.array([_or_nan(value) for value in values], dtype=float)
        except (OverflowError, TypeError, ValueError):
            return None
        if not _sound(column, kinds, values.count(None), _CHECKS[key]):
            return None
        columns[key] = column
    return columns


def _sound(column: Array, kinds: set[type], nulls: int, check: Callable[[Any], Any]) -> bool:
    """Return whether a check lets every value of a column pass."""
    if check is figure:
        within = np.abs(column) < LARGEST
        return kinds <= {int, float, NoneType} and within.sum() == len(column) - nulls
    whole, above = check in (count, positive), check in (positive, above_zero)
    least, most = column.min(), column.max()
    allowed = {int} if whole else {int, float}
    return bool(kinds <= allowed and (least > 0 if above else least >= 0) and most < (2**63 if whole else LARGEST))


def _or_nan(value: float | None) -> float:
    return nan if value is None else value
