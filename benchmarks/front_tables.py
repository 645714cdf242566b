"""Tables and the plot of measured fronts."""

import math
from collections.abc import Sequence
from pathlib import Path

from front_bars import Seeded, end_ratio, percent, times
from front_hull import Place, above, mean_above, steps_ratio
from front_runs import AUTO, DECAYS
from front_search import DECAY, GROWTH, Front, Point, families, kinds
from front_tasks import FrontTask, floor
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from paired import Report
from sfo_plots import log_axes

from distgrow.report.plots import COLOURS

OPEN = {"low": "≤ ", "high": "≥ ", "": ""}


def fronts_table(task: FrontTask, points: Sequence[Point]) -> Report:
    """Return the points of the fronts of families."""
    columns = ["front", "steps", "loss", "schedule", "b₀", "η"]
    if not math.isnan(lowest := floor(task)):
        columns.insert(3, "above the least possible")
    rows: list[list[str]] = []
    for family in families(points):
        for point in family.best():
            steps, loss = point.place()
            ends = "" if point.batch not in grid_ends(task, family) else " (the grid's end)"
            losses = sorted(point.losses.values())
            spread = f" ({losses[0]:.4f} … {losses[-1]:.4f})" if len(losses) > 1 else ""
            over = [] if math.isnan(lowest) else [f"{loss - lowest:.4f}"]
            rows.append(
                [
                    family.name, f"{steps:,.0f}", f"{loss:.4f}{spread}", *over,
                    f"`{point.schedule}`", f"{point.batch}{ends}", rate(point),
                ]
            )  # fmt: skip
    return Report(title=f"Fronts: {task.loss}, median (least … largest) of the seeds", columns=columns, rows=rows)


def grid_ends(task: FrontTask, family: Front) -> tuple[int, int]:
    """Return the smallest and the largest batch that the contestants of a front have."""
    decays = all(point.schedule in DECAYS for point in family.points)
    grid = task.batches if decays else task.starts
    return min(grid), max(grid)


def rate(point: Point) -> str:
    """Return η, marked if the search for it ended at the end of its grid."""
    return f"{OPEN[point.open]}2^{point.exponent}"


def comparison(task: FrontTask, points: Sequence[Point]) -> Report:
    """Return how every front compares with that of tuned decay."""
    fronts = families(points)
    base = next(each for each in fronts if each.name == DECAY)
    lowest = floor(task)
    columns = ["front", "steps", "loss above, mean", "most", "steps ÷, fewest", "half-way", "least loss"]
    if not math.isnan(lowest):
        columns.insert(4, "above the least possible ÷, mean")
    rows: list[list[str]] = []
    for each in [*fronts, *kinds(points)]:
        if each.name != DECAY and each.line() and base.line():
            shown = f"`{each.name}`" if each not in fronts else each.name
            rows.append([shown, *_compared(each, base, lowest)])
    return Report(title="Fronts beside that of tuned decay", columns=columns, rows=rows)


def _compared(line: Front, base: Front, lowest: float) -> list[str]:
    mean: Seeded = lambda sample: mean_above(line.line(sample), base.line(sample))  # noqa: E731
    most: Seeded = lambda sample: above(line.line(sample), base.line(sample))  # noqa: E731
    over: Seeded = lambda sample: _over(line.line(sample), base.line(sample), lowest)  # noqa: E731
    middle: Seeded = lambda sample: _middle(line.line(sample), base.line(sample))  # noqa: E731
    fewest: Seeded = lambda sample: end_ratio(line.line(sample), base.line(sample))  # noqa: E731
    least: Seeded = lambda sample: steps_ratio(line.line(sample), base.line(sample), line.line(sample)[-1][1])  # noqa: E731
    own, other = line.line(), base.line()
    edge = "≥ " if own[0][1] > other[0][1] else ""
    below = "lower than any" if own[-1][1] < other[-1][1] else times(least, line.seeds)
    first = times(fewest, line.seeds)
    excess = [] if math.isnan(lowest) else [times(over, line.seeds)]
    return [
        f"{own[0][0]:,.0f} … {own[-1][0]:,.0f}", percent(mean, line.seeds), percent(most, line.seeds), *excess,
        edge + first, times(middle, line.seeds), below,
    ]  # fmt: skip


def _over(line: Sequence[Place], base: Sequence[Place], lowest: float) -> float | None:
    """Return the mean ratio of what two fronts are above the least possible loss, at equal steps."""
    own, other = ([(steps, loss - lowest) for steps, loss in each] for each in (line, base))
    share = mean_above(own, other)
    return None if share is None else 1 + share


def _middle(line: Sequence[Place], base: Sequence[Place]) -> float | None:
    """Return the steps over those of another front at the loss half-way between what both of them have."""
    high = min(line[0][1], base[0][1])
    low = max(line[-1][1], base[-1][1])
    return steps_ratio(line, base, (low + high) / 2) if low < high else None


def rates(task: FrontTask, points: Sequence[Point]) -> Report:
    """Return the best η and the loss of every schedule at every batch."""
    batches = sorted({point.batch for point in points})
    names = list(dict.fromkeys(point.schedule for point in points))
    found = {(point.schedule, point.batch): point for point in points if not point.reading}
    return Report(
        title="Best η, and the loss with it (the median of the seeds that it has run with), by b₀",
        columns=["schedule", *(f"{batch:,}" for batch in batches)],
        rows=[
            [f"`{name}`", *(_cell(found.get((name, batch))) for batch in batches)] for name in names
        ],
    )  # fmt: skip


def _cell(point: Point | None) -> str:
    return "" if point is None else f"{rate(point)}: {point.place()[1]:.4f}"


def plot(task: FrontTask, points: Sequence[Point], file: Path) -> None:
    """Draw the fronts of families over all of their points."""
    lowest = floor(task)
    shift = 0.0 if math.isnan(lowest) else lowest
    figure = Figure(figsize=(8.5, 4.6), dpi=100, layout="constrained")
    place: Axes = figure.subplots()
    shown = [*families(points), *(kind for kind in kinds(points) if kind.name == AUTO)]
    for number, family in enumerate(shown):
        colour = COLOURS[number % len(COLOURS)]
        plain = family.name in (DECAY, GROWTH)
        steps, losses = zip(*(point.place() for point in family.points), strict=True)
        if plain:
            place.plot(steps, [each - shift for each in losses], ".", color=colour, alpha=0.3, markersize=4)
        line = family.line()
        style = "o-" if plain else "^--"
        place.plot(
            [each[0] for each in line], [each[1] - shift for each in line], style, color=colour, label=family.name,
            markersize=4, linewidth=1.2,
        )  # fmt: skip
    log_axes(place, "serial steps", "loss" + (" above the least possible" if shift else ""))
    place.yaxis.set_major_formatter("{x:g}")
    place.set_title(f"one budget of {task.samples:,} gradient evaluations", fontsize=10)
    _limits(place, points, shift)
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file)


def _limits(place: Axes, points: Sequence[Point], shift: float) -> None:
    """Leave out what lies far above every front."""
    lines = [family.line() for family in families(points)]
    losses = [loss - shift for line in lines for _, loss in line]
    spread = max(losses) / min(losses)
    place.set_ylim(min(losses) / spread**0.05, max(losses) * spread**0.15)
