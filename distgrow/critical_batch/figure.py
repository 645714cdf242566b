"""Branches of a checkpoint, compared: their losses smoothed alike, and one figure; knows no training."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter, NullLocator, StrMethodFormatter

from distgrow.report.log import Array
from distgrow.report.plots import COLOURS

#: Share of a branch's samples that its training loss is a mean over.
WINDOW = 0.25
_POINTS = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Branched:
    """One branch: `updates` of `batch` samples from the checkpoint on."""

    k: int  #: times the run's own batch
    batch: int
    lr: float  #: learning rate of its first update
    updates: int
    loss: float  #: training loss, the mean over its last quarter's samples; inf where it diverged
    test_loss: float  #: at its end; NaN without a test set or a loss of it
    evaluations: int
    seconds: float
    curve: tuple[tuple[int, float], ...]  #: (samples since the checkpoint, batch loss) after each update


def smoothed(curve: Sequence[tuple[int, float]], places: Array, window: float) -> Array:
    """The mean loss per sample over the `window` samples before each of the `places`, fewer where it has only begun.

    All branches draw the same samples, so over the same window their means have the same samples in them: what
    differs is the parameters. A mean over so many updates, in its place, would be of other samples for every batch.
    """
    ends = np.array([0, *(samples for samples, _ in curve)], dtype=float)
    losses = np.array([loss for _, loss in curve])
    total = np.concatenate([[0.0], np.cumsum(losses * np.diff(ends))])
    begins = np.maximum(0.0, places - window)
    return (np.interp(places, ends, total) - np.interp(begins, ends, total)) / (places - begins)


def last_loss(curve: Sequence[tuple[int, float]]) -> float:
    """The mean training loss over the last WINDOW of a branch's samples; inf where an update's loss is not finite."""
    if not curve or not all(math.isfinite(loss) for _, loss in curve):
        return math.inf
    samples = curve[-1][0]
    return float(smoothed(curve, np.array([float(samples)]), WINDOW * samples)[0])


def figure(branches: Sequence[Branched], title: str, answers: Mapping[str, int], tolerance: float) -> Figure:
    """Smoothed training loss against samples, and final losses against the batch with the `answers` (k) marked."""
    drawn = Figure(figsize=(5.0, 6.0), dpi=200, layout="constrained")
    drawn.suptitle(title, parse_math=False)
    above, below = drawn.subplots(2)
    _curves(above, branches)
    _losses(below, branches, answers, tolerance)
    return drawn


def _curves(place: Axes, branches: Sequence[Branched]) -> None:
    for index, branch in enumerate(branches):
        if math.isfinite(branch.loss):
            samples = branch.curve[-1][0]
            places = np.linspace(branch.curve[0][0], samples, _POINTS)
            label = f"batch {branch.batch}"
            values = smoothed(branch.curve, places, WINDOW * samples)
            place.plot(places, values, color=COLOURS[index % len(COLOURS)], linewidth=1.2, label=label)
    _log_where_wide(place, [branch.loss for branch in branches])
    place.set_xlabel("samples since the checkpoint")
    place.set_ylabel("training loss, smoothed")
    place.xaxis.set_major_formatter(EngFormatter(sep=""))
    place.grid(alpha=0.3, linewidth=0.5)
    if place.lines:
        place.legend(fontsize="small", frameon=False)


def _losses(place: Axes, branches: Sequence[Branched], answers: Mapping[str, int], tolerance: float) -> None:
    for index, (kind, k) in enumerate(answers.items()):
        found = {branch.batch: branch.loss if kind == "training" else branch.test_loss for branch in branches}
        found = {batch: loss for batch, loss in found.items() if math.isfinite(loss)}
        colour, batch = COLOURS[index], next(branch.batch for branch in branches if branch.k == k)
        place.plot(list(found), list(found.values()), marker="o", markersize=4, color=colour, label=f"{kind} loss")
        place.axvline(batch, color=colour, linestyle=":", linewidth=1.0 + index)
        if found:
            place.axhline(min(found.values()) + tolerance, color=colour, linestyle="--", linewidth=0.6)
    _log_where_wide(place, [loss for branch in branches for loss in (branch.loss, branch.test_loss)])
    place.set_xscale("log", base=2)
    place.set_xticks([branch.batch for branch in branches])
    place.xaxis.set_minor_locator(NullLocator())
    place.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    place.set_xlabel("batch (samples)\ndotted: the largest no worse; dashed: the best loss and the tolerance")
    place.set_ylabel("loss at the end")
    place.grid(alpha=0.3, linewidth=0.5)
    place.legend(fontsize="small", frameon=False)


def _log_where_wide(place: Axes, losses: Sequence[float]) -> None:
    """Powers of ten, where losses differ by more than one."""
    finite = [loss for loss in losses if math.isfinite(loss)]
    if finite and min(finite) > 0 and max(finite) > 10 * min(finite):
        place.set_yscale("log")
        place.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=7))
        place.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        place.yaxis.set_minor_formatter(NullFormatter())
