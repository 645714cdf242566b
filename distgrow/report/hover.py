"""The values that the page shows where the reader points at a plot, as JSON."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from distgrow.report.curves import Curve, curve, smooth, thin
from distgrow.report.log import Array
from distgrow.report.plots import Plot, look
from distgrow.report.runs import Record

#: Points of each run and panel, at most: what a reader can tell apart by pointing.
POINTS = 300
#: Keys whose lines are drawn smoothed.
SMOOTHED = ("loss", "grad_norm")


def values(records: Sequence[Record], plots: Mapping[str, Plot]) -> str:
    """Return, for each axis, its panels: where their axes are in the picture, and each run's points."""
    axes = {axis: [_panel(records, axis, picture) for picture in plot.panels] for axis, plot in plots.items()}
    names = [{"name": record.name, "colour": look(index)["color"]} for index, record in enumerate(records)]
    text = json.dumps({"runs": names, "axes": axes}, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c")  # no name ends the script


def _panel(records: Sequence[Record], axis: str, picture: Any) -> dict[str, Any]:
    panel = picture.panel
    points = [_points(curve(record, panel.kind, panel.key), axis, panel.kind, panel.key) for record in records]
    return {"box": [round(part, 5) for part in picture.box], "ends": list(picture.ends), "points": points}


def _points(points: Curve, axis: str, kind: str, key: str) -> dict[str, list[float]]:
    chosen = thin(points.values, points.batch, most=POINTS)
    shown = smooth(points, chosen) if kind == "step" and key in SMOOTHED and len(chosen) else points.values[chosen]
    return {"x": _short(points.x[axis][chosen], 7), "y": _short(shown, 5)}


def _short(numbers: Array, digits: int) -> list[float]:
    return [float(f"{number:.{digits}g}") for number in numbers if np.isfinite(number)]
