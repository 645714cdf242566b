"""Plots of runs laid over each other, against SFO, steps or seconds; knows curves, not folders or pages."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, Formatter, LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

from distgrow.report.curves import Array, curve, smooth, thin
from distgrow.report.runs import Events, Record, metrics


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """What one panel shows: a key of the events of one kind."""

    label: str
    kind: str
    key: str


def panels(records: Sequence[Record]) -> list[Panel]:
    """From top to bottom; one for each metric of the test set."""
    return [
        Panel(label="training loss", kind="step", key="loss"),
        *(Panel(label=f"test {name}", kind="eval", key=name) for name in metrics(records)),
        Panel(label="gradient norm", kind="step", key="grad_norm"),
        *[Panel(label="full gradient norm", kind="probe", key="norm")] * _probed(records),
        Panel(label="batch (samples)", kind="step", key="batch"),
        Panel(label="learning rate", kind="step", key="lr"),
    ]


def _probed(records: Sequence[Record]) -> bool:
    """Whether any run has measured ‖∇f‖ exactly."""
    return any("norm" in event for record in records for event in record.events if event["event"] == "probe")


def draw(records: Sequence[Record], axis: str) -> Figure:
    """All panels against one of AXES, a line of each run in each; sized to be read on a phone."""
    rows, (handles, names) = panels(records), _legend(records)
    columns = max(1, min(3, len(names), 42 // max(map(len, names))))
    height = 0.5 + 0.2 * -(-len(names) // columns) + 1.5 * len(rows)
    figure = Figure(figsize=(5.0, height), dpi=200, layout="constrained")
    axes: list[Axes] = list(figure.subplots(len(rows), sharex=True))
    for row, place in zip(rows, axes, strict=True):
        drawn = [_draw(place, row, record, axis, _look(index)) for index, record in enumerate(records)]
        _scale(place, row, np.concatenate(drawn))
    for index, record in enumerate(records):
        _mark(axes, record.events, axis, _look(index)["color"])
    _ground(axes[-1], AXES[axis])
    figure.align_ylabels(axes)
    # names are set afterwards, for Matplotlib would leave out one that begins with an underscore
    legend = figure.legend(handles, ["run"] * len(names), loc="outside upper center", ncols=columns, frameon=False)
    for text, name in zip(legend.get_texts(), names, strict=True):
        text.set_parse_math(False)
        text.set_text(name)
    return figure


def _look(index: int) -> dict[str, Any]:
    """Colour, dashes and width of a run; earlier ones are wider, to be seen where a later one covers them."""
    colour, dashes = COLOURS[index % len(COLOURS)], DASHES[index // len(COLOURS) % len(DASHES)]
    return {"color": colour, "linestyle": dashes, "linewidth": max(1.2, 2.0 - 0.3 * index)}


def _draw(place: Axes, panel: Panel, record: Record, axis: str, look: dict[str, Any]) -> Array:
    """One run's line in one panel; its values."""
    points = curve(record.events, panel.kind, panel.key)
    if not len(points.values):
        return points.values
    chosen = thin(points.values, points.batch)
    x, y = points.places[axis][chosen], points.values[chosen]
    if panel.kind != "step":
        place.plot(x, y, marker=".", markersize=5, **look)
    elif panel.key in ("batch", "lr"):  # a line tells of the update that ends there, so its value holds before it
        place.plot([0, *x], [y[0], *y], drawstyle="steps-pre", **look)
    else:
        place.plot(x, y, alpha=0.25, zorder=1.5, **{**look, "linewidth": 0.6})
        place.plot(x, smooth(points, chosen), marker="." if len(y) < 10 else "", **look)
    return y


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


def _mark(axes: Sequence[Axes], events: Events, axis: str, colour: str) -> None:
    """Dotted lines where the run was resumed, crosses above the loss where an update was skipped."""
    for event in events:
        if event["event"] == "resume":
            for place in axes:
                place.axvline(event[axis], color=colour, linestyle=":", linewidth=1.0)
    skips = np.array([event[axis] for event in events if event["event"] == "skip"], dtype=float)
    skips = skips[thin(skips, np.ones_like(skips))]
    top = axes[0].get_xaxis_transform()
    axes[0].plot(skips, np.full_like(skips, 0.95), "x", color=colour, markersize=4, transform=top)


def _legend(records: Sequence[Record]) -> tuple[list[Line2D], list[str]]:
    """Keys of the runs, and of the marks that occur."""
    kinds = {event["event"] for record in records for event in record.events}
    handles = [Line2D([], [], **_look(index)) for index in range(len(records))]
    names = [textwrap.fill(record.name, 50) for record in records]
    if "resume" in kinds:
        handles.append(Line2D([], [], color="grey", linestyle=":"))
        names.append("resumed")
    if "skip" in kinds:
        handles.append(Line2D([], [], color="grey", linestyle="", marker="x"))
        names.append("update skipped")
    return handles, names
