"""Log: a run's metrics.jsonl as columns and events that grow as the file does; knows one file and draws nothing."""

import json
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby, islice
from math import nan
from pathlib import Path
from typing import IO, Any

import numpy as np

from distgrow.core.errors import RunError
from distgrow.core.progress import Ledger
from distgrow.run.folder import storing
from distgrow.tracking.read import checked, read_line

Array = np.ndarray[Any, np.dtype[Any]]
Event = dict[str, Any]
Events = Sequence[Event]

PARTS = ("applied", "skipped", "replayed", "discarded", "probe")
#: What every line has.
PLACES = ("event", "step", "samples", "time_s")
_SPENT = tuple(f"sfo_{part}" for part in PARTS[1:])
_NEEDED = {
    "step": ("sfo", "epoch", "stage", "batch", "lr", "loss", "grad_norm"),
    "stage": ("epoch", "stage", "batch", "world", "micro", "accum", "lr"),
    "end": ("reason",),
}
_POSITIVE = ("step", "samples", "epoch", "batch")  #: of a step line
_OPTIONAL = ("world", "noise_scale", "samples_per_s")
#: What is kept of a step line.
COLUMNS = (*PLACES[1:], *_NEEDED["step"], *_OPTIONAL, *_SPENT)
_LINES = 5_000  #: parsed in one go, which takes half as long as one by one


class Log:
    """The lines of a run so far, as if it had never crashed: what a resume went back over is left out.

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

    def advance(self) -> bool:
        """Read what was appended since the last call, but for a last line without its end; whether there was any.

        A file that was replaced is read from its beginning. RunError where a line is damaged; all is read again then.
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
                    self._take(self._parsed(lines))
                    self._offset += sum(map(len, lines))
            except RunError:
                self._begin()
                raise
        return self._offset > before

    def __len__(self) -> int:
        """Step lines kept."""
        return len(self._columns["step"])

    def steps(self) -> dict[str, Array]:
        """A copy of the columns."""
        return {key: np.array(column) for key, column in self._columns.items()}

    def events(self) -> list[Event]:
        """All lines but the step lines."""
        return list(self._events)

    def ledger(self) -> Ledger:
        """The ledger after the last line."""
        return self._spent[-1] if self._event_is_last() else self._ledger_of_steps()

    def last(self) -> Event:
        """The last line; of a step line only what is kept of it. Empty before the first."""
        if self._event_is_last():
            return self._events[-1]
        return {"event": "step", **{key: column[-1] for key, column in self._columns.items()}} if len(self) else {}

    # ── taking lines ────────────────────────────────────────────────────────────────────────────────────────────────

    def _parsed(self, lines: list[bytes]) -> list[Event]:
        texts = [line.decode(errors="replace").strip() for line in lines]
        try:
            events = json.loads(f"[{','.join(texts)}]")
        except (ValueError, RecursionError):
            events = []
        if len(events) != len(texts):
            for number, text in enumerate(texts, start=self._lines + 1):
                read_line(text, self.path, number)
        for number, event in enumerate(events, start=self._lines + 1):
            checked(event, self.path, number)
        self._lines += len(lines)
        return events

    def _damaged(self, event: Any, fault: str) -> RunError:
        line = json.dumps(event)
        shown = line if len(line) <= 80 else line[:80] + " …"
        return RunError(f"{self.path} is damaged: the line {shown!r} {fault}; repair or remove that line")

    def _take(self, events: list[Event]) -> None:
        for steps, group in groupby(events, lambda event: event["event"] == "step"):
            if steps:
                self._append(list(group))
            else:
                for event in group:
                    self._add(event)

    def _append(self, rows: list[Event]) -> None:
        ledger = self.ledger()
        missing = {key: getattr(ledger, part) for key, part in zip(_SPENT, PARTS[1:], strict=True)}
        try:
            new = {key: array("d", _numbers(rows, key, missing.get(key, nan))) for key in COLUMNS}
        except (TypeError, ValueError, OverflowError):
            fault = next(row for row in rows if not all(_number(row.get(key)) for key in COLUMNS))
            raise self._damaged(fault, "holds something that is no number") from None
        if not all((np.asarray(new[key]) > 0).all() for key in _POSITIVE):
            fault = next(row for row in rows if not all((row[key] or 0) > 0 for key in _POSITIVE))
            raise self._damaged(fault, f"must have {', '.join(_POSITIVE)} above 0")
        for key, column in new.items():
            self._columns[key].extend(column)

    def _add(self, event: Event) -> None:
        numbers = {*PLACES[1:], *(_NEEDED["stage"] if event["event"] == "stage" else ())}
        numbers |= event.keys() & {"sfo", "batch", *_SPENT}
        if not all(_number(event[key]) and event[key] is not None for key in numbers):
            raise self._damaged(event, "holds something that is no number")
        if event["event"] == "resume":
            self._go_back(event["samples"])
        before = self.ledger()
        parts = {part: event.get(f"sfo_{part}", getattr(before, part)) for part in PARTS[1:]}
        ledger = Ledger(**parts, applied=event["samples"] - parts["skipped"])
        self._events.append({"sfo": ledger.total, **event})
        self._after.append(len(self))
        self._spent.append(ledger)

    def _go_back(self, samples: int) -> None:
        kept = bisect_right(self._columns["samples"], samples)
        for column in self._columns.values():
            del column[kept:]
        remain = [index for index, event in enumerate(self._events) if event["samples"] <= samples]
        self._events = [self._events[index] for index in remain]
        self._after = [self._after[index] for index in remain]
        self._spent = [self._spent[index] for index in remain]

    def _event_is_last(self) -> bool:
        return bool(self._events) and self._after[-1] >= len(self)

    def _ledger_of_steps(self) -> Ledger:
        """Not every update has a line (run.log_every), but every line has `samples`: these are applied or skipped."""
        if not len(self):
            return Ledger()
        parts = {part: int(self._columns[f"sfo_{part}"][-1]) for part in PARTS[1:]}
        return Ledger(**parts, applied=int(self._columns["samples"][-1]) - parts["skipped"])


_PLACES_SET = frozenset(PLACES)
_NEEDED_SETS: Mapping[str, frozenset[str]] = {kind: frozenset(keys) for kind, keys in _NEEDED.items()}


def _whole_lines(file: IO[bytes]) -> Iterator[list[bytes]]:
    """The lines that have their end, many at a time."""
    while lines := list(islice(file, _LINES)):
        if not lines[-1].endswith(b"\n"):
            lines.pop()
        if not lines:
            return
        yield lines


def _numbers(rows: list[Event], key: str, missing: float) -> list[float]:
    return [nan if (value := row.get(key, missing)) is None else value for row in rows]


def _number(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and abs(value) < 1e300)
