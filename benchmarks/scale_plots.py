"""Plots of the scaling benchmark: what decisions cost along each axis, and bytes sent per sample."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, StrMethodFormatter
from scale_planning import UPDATE, Cost

from distgrow.report.plots import COLOURS

NAMES = {
    "world": "ranks",
    "step": "updates so far",
    "samples": "samples of the training set",
    "stages": "stages of a list of stages",
}


def planning(costs: Sequence[Cost], simulated: Mapping[int, float]) -> Figure:
    """A panel for each axis: µs of whole decisions and of their parts; of a simulated rank's whole updates by ranks."""
    figure = Figure(figsize=(10, 7), dpi=100, layout="constrained")
    axes: list[Axes] = list(figure.subplots(2, 2, sharey=True).flat)
    looks = styles(costs)
    for place, (axis, name) in zip(axes, NAMES.items(), strict=True):
        for cost in (cost for cost in costs if cost.axis == axis):
            key = label(cost)
            place.plot(cost.points, [value.median for value in cost.us], label=key, **looks[key])
        if axis == "world" and simulated:
            look = {"color": "black", "marker": "s", "markersize": 4, "linewidth": 1.5}
            place.plot(list(simulated), list(simulated.values()), label="an update, other ranks simulated", **look)
        place.set(xscale="log", yscale="log", xlabel=name)
        place.grid(alpha=0.3, linewidth=0.5)
    for place in axes[::2]:
        place.set_ylabel("µs an update")
    handles = {text: handle for place in axes for handle, text in zip(*place.get_legend_handles_labels(), strict=True)}
    figure.legend(list(handles.values()), list(handles), loc="outside right upper", frameon=False, fontsize=8)
    return figure


def label(cost: Cost) -> str:
    """What its line is called."""
    if cost.part == UPDATE:
        return f"{cost.growth}: whole decision"
    return f"seesaw: {cost.part}" if cost.growth == "seesaw" else cost.part


def styles(costs: Sequence[Cost]) -> dict[str, dict[str, Any]]:
    """Whole decisions are drawn through, their parts dashed."""
    whole = list(dict.fromkeys(label(cost) for cost in costs if cost.part == UPDATE))
    parts = list(dict.fromkeys(label(cost) for cost in costs if cost.part != UPDATE))
    looks: dict[str, dict[str, Any]] = {}
    for names, look in (
        (whole, {"marker": "o", "markersize": 4, "linewidth": 1.5}),
        (parts, {"marker": ".", "markersize": 4, "linewidth": 0.8, "linestyle": "--"}),
    ):
        for at, name in enumerate(names):
            looks[name] = {"color": COLOURS[at % len(COLOURS)], **look}
    return looks


def traffic(found: Mapping[int, Sequence[tuple[int, float]]], theory: Mapping[int, float]) -> Figure:
    """Bytes that a rank sends for a sample, against the batch; `found` and the lines of `theory` by ranks."""
    figure = Figure(figsize=(6, 4), dpi=100, layout="constrained")
    place: Axes = figure.subplots()
    for at, (world, points) in enumerate(found.items()):
        batches, values = zip(*points, strict=True)
        place.plot(batches, values, "o", color=COLOURS[at], label=f"{world} ranks, measured")
        lines = [theory[world] / batch for batch in batches]
        place.plot(
            batches, lines, color=COLOURS[at], linewidth=0.8, label=f"{world} ranks, 2(W − 1)/W · 4 B · parameters"
        )
    place.set(xscale="log", yscale="log", xlabel="batch", ylabel="bytes a rank sends per sample")
    place.set_xticks(batches := sorted({b for points in found.values() for b, _ in points}), map(str, batches))
    place.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    place.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    place.minorticks_off()
    place.grid(alpha=0.3, linewidth=0.5)
    place.legend(frameon=False, fontsize=8)
    return figure
