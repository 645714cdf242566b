"""Plots of runs laid over each other, against SFO, steps or seconds; knows curves, not folders or pages."""

import io
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import imsave
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, Formatter, LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter
from matplotlib.transforms import Bbox

from distgrow.report.curves import curve, smooth, thin
from distgrow.report.log import Array
from distgrow.report.marks import keys, mark_curve, mark_panels
from distgrow.report.runs import Record, metrics
from distgrow.tracking.events import GradientProbe


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """Hold what runs are plotted against: the plot's file and title, the label and the numbers of its x axis."""

    file: str
    title: str
    short: str
    label: str
    whole: bool
    numbers: Formatter


AXES = {
    "sfo": Axis(
        file="against_sfo.png",
        title="Against gradient evaluations",
        short="gradient evaluations",
        label="gradient evaluations of single samples (SFO)",
        whole=True,
        numbers=EngFormatter(sep=""),
    ),
    "step": Axis(
        file="against_steps.png",
        title="Against steps",
        short="steps",
        label="steps (applied updates)",
        whole=True,
        numbers=EngFormatter(sep=""),
    ),
    "time_s": Axis(
        file="against_seconds.png",
        title="Against wall time",
        short="seconds",
        label="wall time of training (s), lost work included",
        whole=False,
        numbers=StrMethodFormatter("{x:,.10g}"),
    ),
}
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")  # Okabe and Ito, 2008
DASHES = ("-", "--", "-.")
#: Learning rates whose largest is so many times the smallest are drawn on a logarithmic axis, down to a LOWESTth.
DECADES, LOWEST = 30, 1e6

#: Estimates of the batch beyond which more samples no longer pay, by the kind of line and the key; how they look.
ESTIMATES = {
    ("step", "noise_scale"): ("noise scale", {"linestyle": (0, (1, 1.2)), "linewidth": 1.1}),
    ("probe", "critical_batch"): ("critical batch", {"linestyle": "", "marker": "P", "markersize": 6}),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """Hold what one panel shows: a key of the lines of one kind."""

    label: str
    kind: str
    key: str


def panels(records: Sequence[Record]) -> list[Panel]:
    """Return the panels from top to bottom; one for each metric of the test set."""
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
    """Return whether any run has measured ‖∇f‖ exactly."""
    return any(record.of(GradientProbe) for record in records)


def draw(records: Sequence[Record], axis: str) -> Figure:
    """Return all panels against one of AXES, a line of each run in each; sized to be read on a phone."""
    rows, (handles, names) = panels(records), _legend(records)
    columns = max(1, min(3, len(names), 45 // max(map(len, names))))
    height = 0.5 + 0.2 * -(-len(names) // columns) + 1.7 * len(rows)
    figure = Figure(figsize=(4.5, height), dpi=200, layout="constrained")
    axes: list[Axes] = list(figure.subplots(len(rows), sharex=True))
    for row, ax in zip(rows, axes, strict=True):
        drawn = [_draw(ax, row, record, axis, look(index)) for index, record in enumerate(records)]
        _scale(ax, row, np.concatenate(drawn))
    for index, record in enumerate(records):
        mark_panels(axes, record, axis, look(index)["color"])
    _ground(axes, AXES[axis])
    figure.align_ylabels(axes)
    # names are set afterwards, for Matplotlib would leave out one that begins with an underscore
    legend = figure.legend(
        handles, ["run"] * len(names), loc="outside upper center", ncols=columns, frameon=False, fontsize="small"
    )
    for text, name in zip(legend.get_texts(), names, strict=True):
        text.set_parse_math(False)
        text.set_text(name)
    return figure


@dataclass(frozen=True, slots=True, kw_only=True)
class PanelPicture:
    """Hold one panel cut out of a plot, and what its pixels mean."""

    panel: Panel
    png: bytes
    box: tuple[float, float, float, float]  #: left, top, right, bottom of its axes, in parts of the picture
    ends: tuple[float, float]  #: x at the left and at the right of its axes


@dataclass(frozen=True, slots=True, kw_only=True)
class Plot:
    """Hold all panels against one of AXES, as one PNG and one by one."""

    png: bytes
    panels: tuple[PanelPicture, ...]


def paint(records: Sequence[Record]) -> dict[str, Plot]:
    """Return all plots, by the keys of AXES."""
    return {key: _shot(draw(records, key), panels(records)) for key in AXES}


def _shot(figure: Figure, rows: Sequence[Panel]) -> Plot:
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba())[..., :3]
    around = [_around(ax, canvas.get_renderer()) for ax in figure.axes]
    left = max(0, int(min(box.x0 for box in around)) - 6)  # alike for all, without the labels at their left
    return Plot(
        png=_png(pixels),
        panels=tuple(
            _cut(ax, panel, pixels, box, left) for ax, panel, box in zip(figure.axes, rows, around, strict=True)
        ),
    )


def _around(ax: Axes, renderer: Any) -> Bbox:
    """Return the pixels of a panel's axes and their numbers, from the lower left."""
    (left, right), (low, high) = ax.get_xlim(), ax.get_ylim()
    below = [label for label in ax.get_xticklabels() if left <= label.get_position()[0] <= right]
    beside = [label for label in ax.get_yticklabels() if low <= label.get_position()[1] <= high]
    boxes = [label.get_window_extent(renderer) for label in (*below, *beside) if label.get_text()]
    return Bbox.union([ax.get_window_extent(renderer), *boxes])


def _cut(ax: Axes, panel: Panel, pixels: Array, around: Bbox, left: int) -> PanelPicture:
    """Cut a panel out of its plot."""
    height = pixels.shape[0]
    top, bottom = max(0, int(height - around.y1) - 12), min(height, int(height - around.y0) + 8)
    wide, tall, axes = pixels.shape[1] - left, bottom - top, ax.get_window_extent()
    across = ((axes.x0 - left) / wide, (axes.x1 - left) / wide)
    down = ((height - axes.y1 - top) / tall, (height - axes.y0 - top) / tall)
    box = (across[0], down[0], across[1], down[1])
    return PanelPicture(panel=panel, png=_png(pixels[top:bottom, left:]), box=box, ends=ax.get_xlim())


def _png(pixels: Array) -> bytes:
    file = io.BytesIO()
    imsave(file, pixels, format="png")
    return file.getvalue()


def look(index: int) -> dict[str, Any]:
    """Return colour, dashes and width of a run; earlier ones are wider, to be seen where a later one covers them."""
    colour, dashes = COLOURS[index % len(COLOURS)], DASHES[index // len(COLOURS) % len(DASHES)]
    return {"color": colour, "linestyle": dashes, "linewidth": max(1.2, 2.0 - 0.3 * index)}


def _draw(ax: Axes, panel: Panel, record: Record, axis: str, look: dict[str, Any]) -> Array:
    """Draw one run's line in one panel; return its values."""
    points = curve(record, panel.kind, panel.key)
    if not len(points.values):
        return points.values
    chosen = thin(points.values, points.batch)
    x, y = points.x[axis][chosen], points.values[chosen]
    if panel.kind != "step":
        ax.plot(x, y, marker=".", markersize=5, **look)
    elif panel.key in ("batch", "lr"):  # a line tells of the update that ends there, so its value holds before it
        ax.plot([0, *x], [y[0], *y], drawstyle="steps-pre", **look)
    else:
        smoothed = smooth(points, chosen)
        ax.plot(x, y, alpha=0.25, zorder=1.5, **{**look, "linewidth": 0.6})
        ax.plot(x, smoothed, marker="." if len(y) < 10 else "", **look)
        mark_curve(ax, record, axis, x, smoothed, look["color"])
    return np.concatenate([y, _estimates(ax, record, axis, look["color"])]) if panel.key == "batch" else y


def _estimates(ax: Axes, record: Record, axis: str, colour: str) -> Array:
    """Draw what was measured of the critical batch; return its usual range, cut so that the batch is still seen."""
    ranges: list[float] = []
    for source, (_, look) in ESTIMATES.items():
        points = curve(record, *source)
        if len(points.values):
            chosen = thin(points.values, points.batch, most=400)
            shown = np.where(points.values[chosen] > 0, points.values[chosen], np.nan)
            ax.plot(points.x[axis][chosen], shown, color=colour, alpha=0.8, zorder=1.8, **look)
            ranges += np.nanquantile(np.where(points.values > 0, points.values, np.nan), (0.02, 0.98)).tolist()
    batch = record.steps["batch"]
    return np.clip(ranges, batch.min() / 64, batch.max() * 16)


def _scale(ax: Axes, panel: Panel, values: Array) -> None:
    """Set the y axis: batches by powers of two, what is widely spread by powers of ten, other rates from 0."""
    ax.set_ylabel(panel.label, parse_math=False)
    ax.grid(alpha=0.3, linewidth=0.5)
    positive = values[values > 0]
    spread = positive.max() / positive.min() if len(positive) and values.min() >= 0 else 1.0
    if panel.key == "batch":
        ax.set_yscale("log", base=2)
        ax.set_ylim(positive.min() / 2, positive.max() * 2)
        ax.yaxis.set_major_locator(LogLocator(base=2, numticks=7))
        ax.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    elif panel.key == "lr" and spread < DECADES:
        ax.set_ylim(0, 1.1 * values.max() or 1.0)
    elif panel.key == "lr":
        ax.set_yscale("log")
        ax.set_ylim(max(positive.min(), positive.max() / LOWEST) / 1.5, positive.max() * 1.5)
    elif panel.key in ("loss", "grad_norm", "norm") and spread > 10:
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 3.0) if spread < 100 else (1.0,), numticks=7))
        ax.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        ax.yaxis.set_minor_formatter(NullFormatter())


def _ground(axes: Sequence[Axes], axis: Axis) -> None:
    """Set the x axis, which all panels share."""
    for ax in axes:
        ax.tick_params(labelbottom=True)  # each panel is shown alone, too
    ax = axes[-1]
    ax.set_xlabel(axis.label)
    ax.xaxis.set_major_locator(MaxNLocator(5, integer=axis.whole))
    ax.xaxis.set_major_formatter(axis.numbers)
    ax.set_xlim(left=0)


def _legend(records: Sequence[Record]) -> tuple[list[Line2D], list[str]]:
    """Return the keys of the runs, and of the estimates and marks that occur."""
    handles = [Line2D([], [], **look(index)) for index in range(len(records))]
    names = [textwrap.fill(record.name, 50) for record in records]
    for source, (label, shape) in ESTIMATES.items():
        if any(len(curve(record, *source).values) for record in records):
            handles.append(Line2D([], [], color="grey", **shape))
            names.append(label)
    marks = keys(records)
    return [*handles, *marks], [*names, *(str(mark.get_label()) for mark in marks)]
