"""Marks of what happened to a run, on its curves, and their keys in the legend; reads no files."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from distgrow.report.log import Array
from distgrow.report.runs import Record
from distgrow.tracking.base_event import Event
from distgrow.tracking.branch_events import BranchTest
from distgrow.tracking.events import OutOfMemory, Resize, Resume, Skip, Stage

#: Marks of one kind along the x axis, at most: hundreds of stages would cover their curve.
MOST = 40
_FILLED: dict[str, Any] = {"markersize": 7, "markeredgecolor": "white", "markeredgewidth": 0.8}
_TICK: dict[str, Any] = {"markersize": 11, "markeredgewidth": 1.4}  # still seen where something else happens there


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """Say how the lines of one kind are shown: a marker on the curve, and if `across` a line through all panels."""

    kind: type[Event]
    label: str
    marker: str  #: in a figure
    sign: str  #: the same as a character
    across: Literal["", ":", "--"] = ""  #: the line's dashes

    @property
    def look(self) -> dict[str, Any]:
        """The marker's look in Matplotlib's terms."""
        return {"marker": self.marker, **(_TICK if self.marker == "|" else _FILLED)}


MARKS = (
    Mark(kind=Stage, label="new stage", marker="|", sign="|"),
    Mark(kind=BranchTest, label="branches compared", marker="^", sign="▲"),
    Mark(kind=Resize, label="workers change", marker="D", sign="◆", across="--"),
    Mark(kind=Resume, label="resumed", marker="o", sign="●", across=":"),
    Mark(kind=Skip, label="update skipped", marker="X", sign="✖"),
    Mark(kind=OutOfMemory, label="out of memory", marker="s", sign="■"),
)


def happened(record: Record, kind: type[Event]) -> list[Event]:
    """Return the lines that are marked; of stages those that follow another, not the same again after a resume."""
    if kind is not Stage:
        return list(record.of(kind))
    return [now for before, now in pairwise(record.of(Stage)) if now.stage != before.stage]


def apart(xs: Array, reach: float) -> Array:
    """Return those of the sorted `xs` that are a MOSTth of `reach` apart, from the first on."""
    kept: list[float] = []
    for x in xs:
        if not kept or x - kept[-1] >= reach / MOST:
            kept.append(x)
    return np.array(kept)


def mark_curve(ax: Axes, record: Record, axis: str, x: Array, y: Array, colour: str) -> None:
    """Draw markers of all kinds on the curve (x, y)."""
    for mark in MARKS:
        xs = _marked_x(record, mark, axis)
        if len(xs) and len(x):
            heights = np.interp(xs, x, y)
            where = {"gid": mark.kind.kind, "zorder": 4, "clip_on": False}
            ax.plot(xs, heights, color=colour, linestyle="", **where, **mark.look)


def mark_panels(panels: Iterable[Axes], record: Record, axis: str, colour: str) -> None:
    """Draw thin lines across all panels at the run's interruptions."""
    xs = [(mark, x) for mark in MARKS if mark.across for x in _marked_x(record, mark, axis)]
    for panel in panels:
        for mark, x in xs:
            panel.axvline(x, color=colour, linestyle=mark.across, linewidth=0.8, alpha=0.7, zorder=1)


def keys(records: Sequence[Record]) -> list[Line2D]:
    """Return what the legend shows of the marks that occur."""
    return [
        Line2D([], [], color="grey", linestyle=mark.across, label=mark.label, **mark.look)
        for mark in MARKS
        if any(happened(record, mark.kind) for record in records)
    ]


def _marked_x(record: Record, mark: Mark, axis: str) -> Array:
    x = np.array([getattr(event, axis) for event in happened(record, mark.kind)], dtype=float)
    return apart(np.sort(x), float(getattr(record.last, axis)))
