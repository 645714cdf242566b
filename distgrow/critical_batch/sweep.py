"""fit_batch(): the critical batch that runs at several constant batches show together; reads run folders alone."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator, StrMethodFormatter
from rich.console import Console
from rich.table import Table

from distgrow.core.counted import counted
from distgrow.core.errors import ConfigError
from distgrow.report.plots import COLOURS
from distgrow.report.runs import Record, read
from distgrow.run.folder import storing
from distgrow.theory.sgd import Tradeoff, measured_tradeoff
from distgrow.tracking.events import Evaluation, Stage

CAPTION = "lines: K(b) = Ab/((ε − C)b − B) and N(b) = b·K(b), fitted\ndotted line: b* = 2B/(ε − C), where N is least"


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrival:
    """Hold when a run came to the target."""

    name: str
    batch: int
    updates: float  #: interpolated between two evaluations; inf if it never came there


def fit_batch(runs: Sequence[str], metric: str, target: float, out: Path | None = None) -> Tradeoff:
    """Fit K(b), the updates to a target, to runs; print the table and b*, and draw both curves.

    Args:
        runs: Folders of runs, each at one batch.
        metric: Name of the metric of the test set that falls to the target.
        target: Its value.
        out: Folder of the figure. None: none is drawn.

    Returns:
        The fit; see measured_tradeoff.

    Raises:
        ConfigError: A run grew or has no such metric, or the runs show no critical batch.
    """
    arrivals = sorted((_arrival(record, metric, target) for record in read(runs)), key=lambda arrival: arrival.batch)
    arrived = [arrival for arrival in arrivals if math.isfinite(arrival.updates)]
    try:
        fit = measured_tradeoff([arrival.batch for arrival in arrived], [arrival.updates for arrival in arrived])
    except ValueError:
        told = ", ".join(f"batch {arrival.batch}: {_told(arrival.updates)}" for arrival in arrivals)
        raise ConfigError(
            f"--target={target:g}: the runs show no critical batch ({told}); of two batches or more, the larger has to "
            "take fewer updates: choose a target that more runs reach, or smaller batches"
        ) from None
    console = Console(highlight=False, soft_wrap=True)
    console.print(_table(arrivals, fit), soft_wrap=False)
    best, last = fit.critical_batch(1.0), fit.critical_steps(1.0)
    console.print(
        f"critical batch b* = {best:,.0f}: about {counted(f'{fit.least_sfo(1.0):,.0f}', 'gradient evaluation')} in "
        f"{counted(f'{last:,.0f}', 'update')} to {metric} {target:g}"
    )
    if not arrived[0].batch <= best <= arrived[-1].batch:
        console.print("it lies outside of the batches of these runs: run some on its other side too")
    if out is not None:
        file = out / f"fit-batch-{metric.replace('/', '-')}-{target:g}.png"
        with storing(out, "--out"):
            out.mkdir(parents=True, exist_ok=True)
            figure(arrived, fit, f"{metric} {target:g}").savefig(file)
        console.print(f"wrote {file}", markup=False)
    return fit


def _arrival(record: Record, metric: str, target: float) -> Arrival:
    batches = {stage.batch for stage in record.of(Stage)} or {record.first_batch}
    if len(batches) > 1:
        raise ConfigError(
            f"{record.name} had the batches {', '.join(map(str, sorted(batches)))}: give runs that keep one batch, "
            "growth.kind=constant"
        )
    found = [(line.step, line.metrics[metric]) for line in record.of(Evaluation) if metric in line.metrics]
    if not found:
        known = ", ".join(record.metrics) or "none: it has no test set, or has not come to an evaluation"
        raise ConfigError(f"--metric={metric}: {record.name} has not evaluated it; it has {known}")
    return Arrival(name=record.name, batch=batches.pop(), updates=_first_at(found, target))


def _first_at(found: Sequence[tuple[int, float]], target: float) -> float:
    """Return the update at which values first fall to the target, on a line between two evaluations; inf if never."""
    before: tuple[int, float] | None = None
    for step, value in found:
        if value <= target:
            if before is None or before[1] == value:
                return float(max(step, 1))
            share = (before[1] - target) / (before[1] - value)
            return before[0] + share * (step - before[0])
        before = (step, value)
    return math.inf


def _told(updates: float) -> str:
    return counted(f"{updates:,.0f}", "update") if math.isfinite(updates) else "never came there"


def _table(arrivals: Sequence[Arrival], fit: Tradeoff) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("run", "batch", "updates", "fitted", "evaluations", "fitted"):
        table.add_column(name, justify="left" if name == "run" else "right", overflow="fold")
    for arrival in arrivals:
        fitted = float(fit.steps_to(float(arrival.batch), 1.0))
        counts = (arrival.updates, fitted, arrival.batch * arrival.updates, arrival.batch * fitted)
        table.add_row(arrival.name, f"{arrival.batch:,}", *(f"{n:,.0f}" if math.isfinite(n) else "—" for n in counts))
    return table


def figure(arrivals: Sequence[Arrival], fit: Tradeoff, target: str) -> Figure:
    """Draw updates and gradient evaluations to the target against the batch, with the curves that fit them."""
    drawn = Figure(figsize=(5.0, 6.0), dpi=200, layout="constrained")
    drawn.suptitle(f"To {target}", parse_math=False)
    drawn.supxlabel(CAPTION, fontsize="small", color="0.35")
    batches = np.array([arrival.batch for arrival in arrivals], dtype=float)
    best = fit.critical_batch(1.0)
    grid = np.geomspace(max(1.02 * fit.b, batches.min() / 2), 2 * batches.max(), 300)
    updates = np.array([arrival.updates for arrival in arrivals])
    for axes, seen, curve, label in zip(
        drawn.subplots(2, sharex=True), (updates, batches * updates), (fit.steps_to, fit.sfo_to),
        ("updates", "gradient evaluations"), strict=True,
    ):  # fmt: skip
        axes.plot(grid, curve(grid, 1.0), color=COLOURS[0], linewidth=1.2)
        axes.plot(batches, seen, "o", color=COLOURS[1], markersize=5)
        axes.axvline(best, color="0.35", linestyle=":")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axes.set_ylim(0.7 * seen.min(), 1.5 * seen.max())
        axes.set_xticks(sorted(set(batches)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axes.set_ylabel(label)
        axes.grid(alpha=0.3, linewidth=0.5)
    drawn.axes[-1].set_xlabel("batch (samples)")
    return drawn
