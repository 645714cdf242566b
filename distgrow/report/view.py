"""View: what the live page shows of runs that go on, read and drawn as they write; knows no HTTP."""

import hashlib
import math
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from distgrow.core.errors import ConfigError
from distgrow.report import hover
from distgrow.report.log import Log
from distgrow.report.page import Picture, content, message, pictures
from distgrow.report.planned import Foresee, Planned
from distgrow.report.plots import paint
from distgrow.report.runs import Record, named, newest
from distgrow.run.folder import RunFolder

#: Share of the time that may go into drawing: the training may need the same processor.
DRAWING = 0.2


@dataclass(slots=True)
class Watched:
    """Hold one run: how far it has been read, and its plan once that is known."""

    name: str
    folder: RunFolder
    log: Log
    plan: Planned | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """Hold the newest plots: the pictures as the page names them, their bytes by file, the values to point at."""

    pictures: dict[str, list[Picture]] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    values: str = "null"


class View:
    """Show runs that go on: figures as they are now, plots as often as DRAWING allows. Thread-safe."""

    def __init__(self, runs: Sequence[str], foresee: Foresee, update_s: float | None = None) -> None:
        self._watched = [Watched(name, folder, Log(folder.metrics)) for name, folder in named(runs).items()]
        self._foresee, self._update_s = foresee, update_s
        self._lock = threading.Lock()
        self._text, self._stale = "", True
        self._shown, self._last_drawn, self._due = list[Record](), list[Record](), 0.0
        self._drawn = Drawn()

    @property
    def names(self) -> list[str]:
        """The runs' names."""
        return [watched.name for watched in self._watched]

    def content(self) -> str:
        """Return the page's content as HTML, read on from where the last call came to."""
        with self._lock:
            try:
                self._text = self._now()
            except (ConfigError, OSError) as error:  # a run's files are at fault: the reader sees it, and asks again
                self._stale = True
                self._text = message(str(error))
            return self._text

    def written(self) -> float | None:
        """Return when a run last wrote something, seconds since 1970; None if none has."""
        logs = [watched.folder.metrics for watched in self._watched]
        return max((log.stat().st_mtime for log in logs if log.is_file()), default=None)

    def picture(self, file: str) -> bytes | None:
        """Return the newest picture of that name, if there is one."""
        with self._lock:
            return self._drawn.files.get(file)

    def _now(self) -> str:
        changed = [watched.log.advance() for watched in self._watched]
        if any(changed):
            self._stale = True
            records = [newest(watched.name, watched.folder, watched.log) for watched in self._watched]
            self._shown = [record for record in records if record is not None]
        if not self._shown:
            return "".join(self._waiting())
        self._draw_if_due()
        if not self._stale:
            return self._text
        page = content(self._shown, self._drawn.pictures, self._drawn.values, self._plans(), self._update_s)
        self._stale = False
        return "".join([*self._waiting(), page])

    def _draw_if_due(self) -> None:
        if time.monotonic() >= self._due and self._last_drawn is not self._shown:
            self._last_drawn, self._due = self._shown, math.inf
            threading.Thread(target=self._draw, args=(self._shown,), daemon=True).start()

    def _draw(self, records: list[Record]) -> None:
        """Draw new plots, in a thread of their own: the figures do not wait for them."""
        began = time.monotonic()
        try:
            plots = paint(records)
            files = {f"{axis}-{k}.png": row.png for axis, plot in plots.items() for k, row in enumerate(plot.panels)}
            named_pictures = {
                axis: [picture.at(f"{axis}-{k}.png?{digest(picture.source)}") for k, picture in enumerate(shown)]
                for axis, shown in pictures(plots).items()
            }
            drawn = Drawn(pictures=named_pictures, files=files, values=hover.values(records, plots))
            with self._lock:
                self._drawn, self._stale = drawn, True
        finally:
            now = time.monotonic()
            self._due = now + (now - began) * (1 / DRAWING - 1)

    def _plans(self) -> list[Planned | None]:
        shown = {record.name: record for record in self._shown}
        for watched in self._watched:
            if watched.plan is None and watched.name in shown:
                watched.plan = self._foresee(shown[watched.name])
        return [watched.plan for watched in self._watched if watched.name in shown]

    def _waiting(self) -> Iterator[str]:
        shown = {record.name for record in self._shown}
        for watched in (watched for watched in self._watched if watched.name not in shown):
            file = watched.folder.metrics
            why = "holds none yet" if file.is_file() else "does not exist yet"
            yield message(f"waiting for the first update of {watched.name}: {file} {why}")


def digest(text: str) -> str:
    """Return a short name of a text."""
    return hashlib.sha256(text.encode(errors="replace")).hexdigest()[:16]
