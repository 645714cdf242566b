"""Figure of the branches of a checkpoint: training losses, smoothed over the same samples. Knows no training."""

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter, NullLocator, StrMethodFormatter

from distgrow.report.plots import COLOURS
from distgrow.training.short_run import WINDOW, smooth

_POINTS = 200
#: Characters of a line of the title.
TITLE_WIDTH = 40
#: Characters that all batches may have on their axis before they are turned.
TICK_WIDTH = 32
CAPTION = (
    "dotted line: the largest batch that is no worse\n"
    "dashed line: the best loss of all batches plus the tolerance of {tolerance:g}"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class BranchResult:
    """Hold the result of one branch: `updates` of `batch` samples each, from the checkpoint on."""

    k: int  #: batch, as a multiple of the run's own
    batch: int
    lr: float  #: learning rate of its first update
    updates: int
    loss: float  #: training loss, the mean over the last quarter of its samples; inf if it diverged
    test_loss: float  #: at its end; NaN if there is no test set, or no loss on it; inf if the branch diverged
    evaluations: int
    seconds: float
    curve: tuple[tuple[int, float], ...]  #: (samples since the checkpoint, batch loss) after each update


def figure(branches: Sequence[BranchResult], title: str, answers: Mapping[str, int], tolerance: float) -> Figure:
    """Draw the smoothed training loss against samples, and the final losses against the batch.

    Args:
        branches: The branches, the smallest batch first.
        title: Title. It is broken into lines.
        answers: The k to be marked, by kind of loss: `training`, `test`.
        tolerance: How much worse than the best loss a larger batch may be.
    """
    drawn = Figure(figsize=(5.0, 6.4), dpi=200, layout="constrained")
    drawn.suptitle(textwrap.fill(title, TITLE_WIDTH, max_lines=3, placeholder=" …"), parse_math=False)
    drawn.supxlabel(CAPTION.format(tolerance=tolerance), fontsize="small", color="0.35")
    above, below = drawn.subplots(2)
    _curves(above, branches)
    _losses(below, branches, answers, tolerance)
    return drawn


def _curves(axes: Axes, branches: Sequence[BranchResult]) -> None:
    for index, branch in enumerate(branches):
        if math.isfinite(branch.loss):
            samples = branch.curve[-1][0]
            positions = np.linspace(branch.curve[0][0], samples, _POINTS)
            label = f"batch {branch.batch}"
            values = smooth(branch.curve, positions, WINDOW * samples)
            axes.plot(positions, values, color=COLOURS[index % len(COLOURS)], linewidth=1.2, label=label)
    _log_if_wide(axes, [branch.loss for branch in branches])
    axes.set_xlabel("samples since the checkpoint")
    axes.set_ylabel("training loss, smoothed")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.grid(alpha=0.3, linewidth=0.5)
    if axes.lines:
        axes.legend(fontsize="small", frameon=False)


def _losses(axes: Axes, branches: Sequence[BranchResult], answers: Mapping[str, int], tolerance: float) -> None:
    for index, (kind, k) in enumerate(answers.items()):
        losses = {branch.batch: branch.loss if kind == "training" else branch.test_loss for branch in branches}
        losses = {batch: loss for batch, loss in losses.items() if math.isfinite(loss)}
        colour, batch = COLOURS[index], next(branch.batch for branch in branches if branch.k == k)
        axes.plot(list(losses), list(losses.values()), marker="o", markersize=4, color=colour, label=f"{kind} loss")
        axes.axvline(batch, color=colour, linestyle=":", linewidth=1.0 + index)
        if losses:
            axes.axhline(min(losses.values()) + tolerance, color=colour, linestyle="--", linewidth=0.6)
    _log_if_wide(axes, [loss for branch in branches for loss in (branch.loss, branch.test_loss)])
    axes.set_xscale("log", base=2)
    axes.set_xticks([branch.batch for branch in branches])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.tick_params(axis="x", rotation=0 if sum(len(f"{branch.batch:,}") for branch in branches) <= TICK_WIDTH else 30)
    axes.set_xlabel("batch (samples)")
    axes.set_ylabel("loss at the end")
    axes.grid(alpha=0.3, linewidth=0.5)
    axes.legend(fontsize="small", frameon=False)


def _log_if_wide(axes: Axes, losses: Sequence[float]) -> None:
    """Scale the losses logarithmically if they differ by more than a power of ten."""
    finite = [loss for loss in losses if math.isfinite(loss)]
    if finite and min(finite) > 0 and max(finite) > 10 * min(finite):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=7))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
