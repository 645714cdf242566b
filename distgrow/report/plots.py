"""Plots of runs laid over each other, against SFO, steps or seconds; knows curves, not folders or pages."""

import io
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, Formatter, LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

from distgrow.report.curves import curve, smooth, thin
from distgrow.report.log import Array
from distgrow.report.marks import keys, mark_curve, mark_panels
from distgrow.report.runs import Record, metrics


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """What runs are plotted against: the file of that plot, its title, the label and the numbers of its x axis."""

    file: str
    title: str
    label: str
    whole: bool
    numbers: Formatter


AXES = {
    "sfo": Axis(
        file="against_sfo.png",
        title="Against gradient evaluations",
        label="gradient evaluations of single samples (SFO)",
        whole=True,
        numbers=EngFormatter(sep=""),
    ),
    "step": Axis(
        file="against_steps.png",
        title="Against steps",
        label="steps (applied updates)",
        whole=True,
        numbers=EngFormatter(sep=""),
    ),
    "time_s": Axis(
        file="against_seconds.png",
        title="Against wall time",
        label="wall time of training (s), lost work included",
        whole=False,
        numbers=StrMethodFormatter("{x:,.10g}"),
    ),
}
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")  # Okabe and Ito, 2008
DASHES = ("-", "--", "-.")


#: Estimates of the batch beyond which more samples no longer pay, by the kind of line and the key; how they look.
ESTIMATES = {
    ("step", "noise_scale"): ("noise scale", {"linestyle": (0, (1, 1.2)), "linewidth": 1.1}),
    ("probe", "critical_batch"): ("critical batch", {"linestyle": "", "marker": "P", "markersize": 6}),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """What one panel shows: a key of the lines of one kind."""

    label: str
    kind: str
    key: str


def panels(records: Sequence[Record]) -> list[Panel]:
    """From top to bottom; one for each metric of the test set."""
    estimated = any(len(curve(record, *source).values) for record in records for source in ESTIMATES)
    return [
        Panel(label="training loss", kind="step", key="loss"),
        *(Panel(label=f"test {name}", kind="eval", key=name) for name in metrics(records)),
        Panel(label="gradient norm", kind="step", key="grad_norm"),
        *[Panel(label="full gradient norm", kind="probe", key="norm")] * _probed(records),
        Panel(label="batch and estimates\n(samples)" if estimated else "batch (samples)", kind="step", key="batch"),
        Panel(label="learning rate", kind="step", key="lr"),
    ]


def _probed(records: Sequence[Record]) -> bool:
    """Whether any run has measured ‖∇f‖ exactly."""
    return any("norm" in event for record in records for event in record.of("probe"))


def draw(records: Sequence[Record], axis: str) -> Figure:
    """All panels against one of AXES, a line of each run in each; sized to be read on a phone."""
    rows, (handles, names) = panels(records), _legend(records)
    columns = max(1, min(3, len(names), 45 // max(map(len, names))))
    height = 0.5 + 0.2 * -(-len(names) // columns) + 1.45 * len(rows)
    figure = Figure(figsize=(4.5, height), dpi=200, layout="constrained")
    axes: list[Axes] = list(figure.subplots(len(rows), sharex=True))
    for row, place in zip(rows, axes, strict=True):
        drawn = [_draw(place, row, record, axis, _look(index)) for index, record in enumerate(records)]
        _scale(place, row, np.concatenate(drawn))
    for index, record in enumerate(records):
        mark_panels(axes, record, axis, _look(index)["color"])
    _ground(axes[-1], AXES[axis])
    figure.align_ylabels(axes)
    # names are set afterwards, for Matplotlib would leave out one that begins with an underscore
    legend = figure.legend(
        handles, ["run"] * len(names), loc="outside upper center", ncols=columns, frameon=False, fontsize="small"
    )
    for text, name in zip(legend.get_texts(), names, strict=True):
        text.set_parse_math(False)
        text.set_text(name)
    return figure


def paint(records: Sequence[Record]) -> dict[str, bytes]:
    """All plots as PNGs, by the file names of AXES."""
    return {axis.file: _png(draw(records, key)) for key, axis in AXES.items()}


def _png(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def _look(index: int) -> dict[str, Any]:
    """Colour, dashes and width of a run; earlier ones are wider, to be seen where a later one covers them."""
    colour, dashes = COLOURS[index % len(COLOURS)], DASHES[index // len(COLOURS) % len(DASHES)]
    return {"color": colour, "linestyle": dashes, "linewidth": max(1.2, 2.0 - 0.3 * index)}


def _draw(place: Axes, panel: Panel, record: Record, axis: str, look: dict[str, Any]) -> Array:
    """One run's line in one panel; its values."""
    points = curve(record, panel.kind, panel.key)
    if not len(points.values):
        return points.values
    chosen = thin(points.values, points.batch)
    x, y = points.places[axis][chosen], points.values[chosen]
    if panel.kind != "step":
        place.plot(x, y, marker=".", markersize=5, **look)
    elif panel.key in ("batch", "lr"):  # a line tells of the update that ends there, so its value holds before it
        place.plot([0, *x], [y[0], *y], drawstyle="steps-pre", **look)
    else:
        smoothed = smooth(points, chosen)
        place.plot(x, y, alpha=0.25, zorder=1.5, **{**look, "linewidth": 0.6})
        place.plot(x, smoothed, marker="." if len(y) < 10 else "", **look)
        mark_curve(place, record, axis, x, smoothed, look["color"])
    return np.concatenate([y, _estimates(place, record, axis, look["color"])]) if panel.key == "batch" else y


def _estimates(place: Axes, record: Record, axis: str, colour: str) -> Array:
    """What was measured of the critical batch, beside the batch; its usual range, as far as the batch is still seen."""
    ranges: list[float] = []
    for source, (_, look) in ESTIMATES.items():
        points = curve(record, *source)
        if len(points.values):
            chosen = thin(points.values, points.batch, most=400)
            shown = np.where(points.values[chosen] > 0, points.values[chosen], np.nan)
            place.plot(points.places[axis][chosen], shown, color=colour, alpha=0.8, zorder=1.8, **look)
            ranges += np.nanquantile(np.where(points.values > 0, points.values, np.nan), (0.02, 0.98)).tolist()
    batch = record.steps["batch"]
    return np.clip(ranges, batch.min() / 64, batch.max() * 16)


def _scale(place: Axes, panel: Panel, values: Array) -> None:
    """The y axis: batches by powers of two, widely spread losses and norms by powers of ten, rates from 0."""
    place.set_ylabel(panel.label, parse_math=False)
    place.grid(alpha=0.3, linewidth=0.5)
    positive = values[values > 0]
    spread = positive.max() / positive.min() if len(positive) and values.min() >= 0 else 1.0
    if panel.key == "batch":
        place.set_yscale("log", base=2)
        place.set_ylim(positive.min() / 2, positive.max() * 2)
        place.yaxis.set_major_locator(LogLocator(base=2, numticks=7))
        place.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    elif panel.key == "lr":
        place.set_ylim(0, 1.1 * values.max() or 1.0)
    elif panel.key in ("loss", "grad_norm", "norm") and spread > 10:
        place.set_yscale("log")
        place.yaxis.set_major_locator(LogLocator(subs=(1.0, 3.0) if spread < 100 else (1.0,), numticks=7))
        place.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        place.yaxis.set_minor_formatter(NullFormatter())


def _ground(place: Axes, axis: Axis) -> None:
    """The x axis, which all panels share."""
    place.set_xlabel(axis.label)
    place.xaxis.set_major_locator(MaxNLocator(5, integer=axis.whole))
    place.xaxis.set_major_formatter(axis.numbers)
    place.set_xlim(left=0)


def _legend(records: Sequence[Record]) -> tuple[list[Line2D], list[str]]:
    """Keys of the runs, and of the estimates and marks that occur."""
    handles = [Line2D([], [], **_look(index)) for index in range(len(records))]
    names = [textwrap.fill(record.name, 50) for record in records]
    for source, (label, look) in ESTIMATES.items():
        if any(len(curve(record, *source).values) for record in records):
            handles.append(Line2D([], [], color="grey", **look))
            names.append(label)
    marks = keys(records)
    return [*handles, *marks], [*names, *(str(mark.get_label()) for mark in marks)]
