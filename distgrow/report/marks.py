"""Marks of what happened to a run, at their places on its curves, and their keys in the legend; reads no files."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from distgrow.report.log import Array, Event
from distgrow.report.runs import Record

#: Marks of one kind along the x axis, at most: hundreds of stages would cover their curve.
MOST = 40
_FILLED: dict[str, Any] = {"markersize": 7, "markeredgecolor": "white", "markeredgewidth": 0.8}
_TICK: dict[str, Any] = {"markersize": 11, "markeredgewidth": 1.4}  # still seen where something else happens there


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """How the lines of one kind are shown: a marker on the curve, and where `across` a line through all panels."""

    kind: str
    label: str
    marker: str
    across: Literal["", ":", "--"] = ""  #: the line's dashes

    @property
    def look(self) -> dict[str, Any]:
        """How Matplotlib is to draw the marker."""
        return {"marker": self.marker, **(_TICK if self.marker == "|" else _FILLED)}


MARKS = (
    Mark(kind="stage", label="new stage", marker="|"),
    Mark(kind="resize", label="workers change", marker="D", across="--"),
    Mark(kind="resume", label="resumed", marker="o", across=":"),
    Mark(kind="skip", label="update skipped", marker="X"),
    Mark(kind="oom", label="out of memory", marker="s"),
)


def happened(record: Record, kind: str) -> list[Event]:
    """The lines that are marked; of stages those that follow another, not the same again after a resume."""
    found = record.of(kind)
    if kind != "stage":
        return list(found)
    return [now for before, now in zip(found, found[1:], strict=False) if now["stage"] != before["stage"]]


def apart(places: Array, reach: float) -> Array:
    """Of sorted places those that are a MOSTth of `reach` apart: the first, and each as soon as there is room."""
    kept: list[float] = []
    for place in places:
        if not kept or place - kept[-1] >= reach / MOST:
            kept.append(place)
    return np.array(kept)


def mark_curve(place: Axes, record: Record, axis: str, x: Array, y: Array, colour: str) -> None:
    """Markers of all kinds on the curve (x, y)."""
    for mark in MARKS:
        places = _places(record, mark, axis)
        if len(places) and len(x):
            heights = np.interp(places, x, y)
            where = {"gid": mark.kind, "zorder": 4, "clip_on": False}
            place.plot(places, heights, color=colour, linestyle="", **where, **mark.look)


def mark_panels(panels: Iterable[Axes], record: Record, axis: str, colour: str) -> None:
    """Thin lines across all panels where the run was interrupted."""
    places = [(mark, x) for mark in MARKS if mark.across for x in _places(record, mark, axis)]
    for panel in panels:
        for mark, x in places:
            panel.axvline(x, color=colour, linestyle=mark.across, linewidth=0.8, alpha=0.7, zorder=1)


def keys(records: Sequence[Record]) -> list[Line2D]:
    """What the legend shows of the marks that occur."""
    return [
        Line2D([], [], color="grey", linestyle=mark.across, label=mark.label, **mark.look)
        for mark in MARKS
        if any(happened(record, mark.kind) for record in records)
    ]


def _places(record: Record, mark: Mark, axis: str) -> Array:
    found = np.array([event[axis] for event in happened(record, mark.kind)], dtype=float)
    return apart(np.sort(found), float(record.last[axis]))
