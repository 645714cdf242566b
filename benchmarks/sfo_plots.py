"""Plots of the SFO benchmark: evaluations against serial steps, and time to target against workers."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter
from sfo_problems import Problem
from sfo_results import Setting
from sfo_tables import MEASURES

from distgrow.report.plots import COLOURS

DASHES = {"constant": ":", "decay": "--", "growth": "-"}  #: of the families' fronts
MARKERS = {"constant": ("s",), "decay": ("^",), "growth": ("o", "D", "P")}
DEFAULT = {"color": "#d62728", "marker": "*", "markersize": 11, "zorder": 3}  #: of what is not tuned


def pareto(problem: Problem, among: Sequence[Setting], measure: str, targets: Sequence[float]) -> Figure | None:
    """A panel for each target: every setting's median evaluations against its median steps; None where none arrived."""
    epoch = next(run.epoch for setting in among for run in setting.runs)
    panels = [(target, arrived(among, measure, target, epoch)) for target in targets]
    panels = [(target, points) for target, points in panels if points]
    if not panels:
        return None
    columns = min(2, len(panels))
    figure = Figure(figsize=(4.2 * columns + 2, 3.2 * -(-len(panels) // columns) + 0.3), dpi=100, layout="constrained")
    looks = styles(problem, {policy for _, points in panels for policy, _, _ in points})
    axes: list[Axes] = list(figure.subplots(-(-len(panels) // columns), columns, squeeze=False).flat)
    for place in axes[len(panels) :]:
        place.set_visible(False)
    for place, (target, points) in zip(axes, panels, strict=False):
        for policy, steps, epochs in points:
            place.plot(steps, epochs, linestyle="", alpha=0.8, **looks[policy])
        for family, dashes in DASHES.items():
            members = {policy.name for policy in problem.policies if policy.family == family}
            if front := pareto_front([(steps, epochs) for policy, steps, epochs in points if policy in members]):
                place.plot(*zip(*front, strict=True), zorder=1, drawstyle="steps-post", **line(dashes))
        place.set_title(f"{MEASURES[measure]} ≤ {target:g}", fontsize=10)
        log_axes(place, "serial steps", "epochs of gradient evaluations")
    legend(figure, looks, DASHES)
    return figure


def arrived(among: Sequence[Setting], measure: str, target: float, epoch: int) -> list[tuple[str, float, float]]:
    """(policy, median steps, median epochs) of the settings whose median run came to the target."""
    points: list[tuple[str, float, float]] = []
    for setting in among:
        sfo, steps = setting.rank(measure, target)
        if math.isfinite(sfo) and math.isfinite(steps):
            points.append((setting.policy, steps, sfo / epoch))
    return points


def pareto_front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the points that no other point dominates, by rising first coordinate."""
    front: list[tuple[float, float]] = []
    for point in sorted(points):
        if not front or point[1] < front[-1][1]:
            front.append(point)
    return front


def times(problem: Problem, seconds: Mapping[str, Mapping[int, float]], title: str) -> Figure:
    """Seconds to a target by policy and number of workers."""
    figure = Figure(figsize=(7.5, 4.2), dpi=100, layout="constrained")
    place: Axes = figure.subplots()
    looks = styles(problem, set(seconds))
    for policy, look in looks.items():
        workers, values = zip(*seconds[policy].items(), strict=True)
        place.plot(workers, values, linewidth=1.3, **look)
    place.set_title(title, fontsize=10)
    log_axes(place, "workers", "seconds to the target")
    ticks = sorted({workers for each in seconds.values() for workers in each})
    place.set_xticks(ticks, [f"{workers:,}" for workers in ticks])
    legend(figure, looks, {})
    return figure


def styles(problem: Problem, present: set[str]) -> dict[str, dict[str, Any]]:
    """Colour and marker of each policy that is present; markers tell families apart."""
    looks: dict[str, dict[str, Any]] = {}
    counts = dict.fromkeys(MARKERS, 0)
    for policy in problem.policies:
        at = counts[policy.family]
        counts[policy.family] += 1
        markers = MARKERS[policy.family]
        colour, marker = COLOURS[at % len(COLOURS)], markers[at // len(COLOURS) % len(markers)]
        look = {"color": colour, "marker": marker, "markersize": 5} if policy.tuned else DEFAULT
        if policy.name in present:
            looks[policy.name] = {**look, "fillstyle": "none" if policy.family != "growth" else "full"}
    return looks


def log_axes(place: Axes, x: str, y: str) -> None:
    """Set logarithmic axes with plain numbers."""
    place.set(xscale="log", yscale="log", xlabel=x, ylabel=y)
    place.grid(alpha=0.3, linewidth=0.5)
    for axis in (place.xaxis, place.yaxis):
        axis.set_major_locator(LogLocator(subs=(1.0, 3.0), numticks=8))
        axis.set_major_formatter(EngFormatter(sep=""))
        axis.set_minor_formatter(NullFormatter())


def legend(figure: Figure, looks: Mapping[str, Mapping[str, Any]], fronts: Mapping[str, str]) -> None:
    """One for all panels; `fronts` are families and the dashes of theirs."""
    handles = [Line2D([], [], linestyle="", **look) for look in looks.values()]
    handles += [Line2D([], [], **line(dashes)) for dashes in fronts.values()]
    names = [*looks, *(f"front of {family}" for family in fronts)]
    figure.legend(handles, names, loc="outside right upper", frameon=False, fontsize=8)


def line(dashes: str) -> dict[str, Any]:
    """Return how a front is drawn."""
    return {"color": "#777777", "linewidth": 0.8, "linestyle": dashes}
