"""What a recorded run shows of its loss: mean losses, when they were seen, and the course of (η, b) up to there."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from distgrow.core.counted import counted
from distgrow.core.errors import ConfigError
from distgrow.report.log import Array
from distgrow.report.runs import Record
from distgrow.theory.scaling_law import Course
from distgrow.tracking.events import Evaluation

#: Of the samples: where the fit begins, as the law is none of the first updates.
BEGIN = 0.25
#: Means of the training loss, at most; fewer if they would be of fewer lines each. Evaluations are never merged.
MEANS, LINES = 48, 4
#: Evaluations to each side whose scatter is that of one between them.
BESIDE = 3
#: What a run has to show at least.
FEWEST_UPDATES, FEWEST_EVALUATIONS = 100, 12
#: Whole epochs that a mean is made of each, at least; how much may be missing of the last, in epochs.
FEWEST_EPOCHS, EVEN = 3, 0.01
#: Parts of the course from one mean to the next.
PARTS = 2
#: A run that goes on has to have spent so much of its budget.
SPENT = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Observed:
    """Hold the losses of a run in the order of their updates."""

    losses: Array  #: means of blocks and of whole epochs, or evaluations
    errors: Array  #: their standard errors
    course: Course
    evaluated: bool  #: whether they are evaluations
    epochs: int  #: how many of the losses, the last ones, are means of whole epochs
    over: Array  #: (losses, parts): each loss as a mean of those after the parts of the course
    samples: int  #: of the whole run, as its budget has it
    variance: float | None  #: tr Σ as measured, the median over the second half; None: it was not

    @property
    def late(self) -> NDArray[np.bool_]:
        """Return which losses are of the second half of the samples."""
        return self.over @ self.course.samples > self.course.samples[-1] / 2


def observed(record: Record, metric: str | None = None) -> Observed:
    """Return what a run shows.

    Args:
        record: The run.
        metric: A metric of its test set that falls. None: the training loss.

    Raises:
        ConfigError: The run is too short, has not come far enough or has no such metric.
    """
    budget, lines = record.budget or record.ledger.applied, _Lines(record)
    _check_length(record, budget, lines)
    epochs = _epochs(lines, record.epoch) if metric is None else []
    if metric is None:
        blocks = _blocks(lines)
        spans = blocks + epochs
        losses = np.array([lines.mean(*span) for span in spans])
        errors = np.array([_scatter(lines.loss[first:last]) for first, last in blocks])
        errors = np.concatenate([errors, _local(losses[len(blocks) :])])
    else:
        places, losses = _evaluations(record, metric, lines)
        spans, errors = [(place, place) for place in places], _local(losses)
    if losses.min() <= 0:
        raise ConfigError(
            f"{record.name}: {metric or 'its training loss'} comes to {losses.min():.4g}, and the law is of losses "
            "that stay above 0; give a --metric that does, or another run"
        )
    course, over = lines.course(spans)
    return Observed(
        losses=losses,
        errors=errors,
        evaluated=metric is not None,
        epochs=len(epochs),
        course=course,
        over=over,
        samples=record.ledger.applied if record.ended else round(budget),
        variance=_variance(record, lines),
    )


def _check_length(record: Record, budget: float, lines: "_Lines") -> None:
    """Raise ConfigError if a run has not come far enough, or shows too few updates."""
    if not record.ended and record.ledger.applied < SPENT * budget:
        share = record.ledger.applied / budget
        raise ConfigError(
            f"{record.name} has spent {share:.0%} of its budget, too little to tell its end; wait for {SPENT:.0%}"
        )
    if len(lines.step) < FEWEST_UPDATES:
        raise ConfigError(
            f"{record.name} shows {counted(len(lines.step), 'update')} with a loss, too few for a fit; it needs "
            f"{FEWEST_UPDATES}: lower run.log_every, or give a longer run"
        )


class _Lines:
    """Hold the columns of the updates that have a loss and move."""

    def __init__(self, record: Record) -> None:
        steps = record.steps
        kept = np.isfinite(steps["loss"]) & (steps["lr"] > 0)
        self.step, self.samples, self.lr, self.loss = (steps[key][kept] for key in ("step", "samples", "lr", "loss"))
        self.updates = np.maximum(np.diff(self.step, prepend=0.0), 1.0)
        self.batch = np.maximum(np.diff(self.samples, prepend=0.0), 1.0) / self.updates

    def mean(self, first: int, last: int) -> float:
        """Return the mean loss of the samples of lines."""
        own = slice(first, last)
        return float(np.average(self.loss[own], weights=(self.updates * self.batch)[own]))

    def course(self, spans: Sequence[tuple[int, int]]) -> tuple[Course, Array]:
        """Return the course in PARTS parts from one span's end to the next, and Observed.over of the spans of lines."""
        cuts = {0, len(self.step)}
        for first, last in pairwise(sorted({0, len(self.step), *(edge for span in spans for edge in span)})):
            cuts |= set(np.linspace(first, last, PARTS + 1).round().astype(int).tolist())
        edges = np.array(sorted(cuts))

        def sums(values: Array) -> Array:
            return np.add.reduceat(values, edges[:-1])

        updates = sums(self.updates)
        rates = sums(self.updates * self.lr) / updates
        batches = rates**2 * updates / sums(self.updates * self.lr**2 / self.batch)
        samples = sums(self.updates * self.batch)
        over = np.zeros((len(spans), len(updates)))
        for row, (first, last) in zip(over, np.searchsorted(edges, spans), strict=True):
            if first == last:  # an evaluation
                row[last - 1] = 1.0
                continue
            own = np.arange(first, last)
            for ends in (own, np.maximum(own - 1, 0)):  # the mean over a part is that of both its ends
                np.add.at(row, ends, samples[own] / samples[own].sum() / 2)
        return Course(updates=updates, rates=rates, batches=batches), over


def _blocks(lines: _Lines) -> list[tuple[int, int]]:
    """Return spans of lines from BEGIN on, shorter at first."""
    share = lines.samples / lines.samples[-1]
    edges = [int(np.searchsorted(share, BEGIN))]
    for edge in np.searchsorted(share, _shares()[1:], side="right"):
        if edge - edges[-1] >= LINES:
            edges.append(int(edge))
    return list(pairwise(edges))


def _epochs(lines: _Lines, epoch: float) -> list[tuple[int, int]]:
    """Return spans of whole epochs from BEGIN on; none if they are few.

    An epoch has each sample once, so its mean does not depend on which samples a block happens to have.
    """
    ends = np.unique(np.floor(_shares() * lines.samples[-1] / epoch + EVEN)) * epoch
    edges = np.searchsorted(lines.samples, ends - lines.batch[-1] / 2) + 1
    first = np.searchsorted(lines.samples, BEGIN * lines.samples[-1])
    found = list(pairwise(int(edge) for edge in np.unique(edges) if first <= edge <= len(lines.samples)))
    return found if len(found) >= FEWEST_EPOCHS else []


def _shares() -> Array:
    """Return the shares of the samples at which blocks should end."""
    return np.union1d(np.geomspace(BEGIN, 1, MEANS // 2), np.linspace(BEGIN, 1, MEANS // 2))


def _scatter(losses: Array) -> float:
    """Return the standard error of a mean of losses, without their trend."""
    return float(np.sqrt(np.mean(np.diff(losses) ** 2) / 2 / len(losses)))


def _local(losses: Array) -> Array:
    """Return the standard error of each of some losses, from the scatter of those around it about a line."""
    if not len(losses):
        return losses
    bends = np.abs(np.diff(losses, 2)) / math.sqrt(6)
    bends = np.concatenate([bends[:1], bends, bends[-1:]])
    around = [bends[max(0, place - BESIDE) : place + BESIDE + 1] for place in range(len(bends))]
    return np.array([math.sqrt(np.mean(own**2)) for own in around])


def _evaluations(record: Record, metric: str, lines: _Lines) -> tuple[list[int], Array]:
    """Return the lines that evaluations came after, and the evaluated metric."""
    found = {
        line.step: (line.samples, line.metrics[metric]) for line in record.of(Evaluation) if metric in line.metrics
    }
    begin = BEGIN * lines.samples[-1]
    seen = [(step, value) for step, (samples, value) in found.items() if samples >= begin]
    if len(seen) < FEWEST_EVALUATIONS:
        known = ", ".join(record.metrics) or "none"
        raise ConfigError(
            f"--metric={metric}: {record.name} has evaluated it {counted(len(seen), 'time')}, too few for a fit; it "
            f"needs {FEWEST_EVALUATIONS} (its metrics: {known}); evaluate more often (run.eval), or leave --metric out "
            "for the training loss"
        )
    (_, first), last = next(iter(found.values())), float(np.mean([value for _, value in seen[len(seen) // 2 :]]))
    if last > first:
        raise ConfigError(
            f"--metric={metric}: {record.name} began at {first:.4g} and ended near {last:.4g}; the law is of losses "
            "that fall as a run trains; give such a metric, or leave --metric out for the training loss"
        )
    steps, values = np.asarray(seen, float).T
    return np.searchsorted(lines.step, steps, side="right").tolist(), values


def _variance(record: Record, lines: _Lines) -> float | None:
    """Return tr Σ over the second half of the run: the median of what was measured, else the mean of b·‖g‖².

    The latter is tr Σ + b·‖∇f‖², which is close to it once noise outweighs the gradient.
    """
    half = record.steps["samples"] >= lines.samples[-1] / 2
    traces, squares = record.steps["noise_trace"][half], (record.steps["batch"] * record.steps["grad_norm"] ** 2)[half]
    measured, bounds = traces[traces > 0], squares[np.isfinite(squares) & (squares > 0)]
    if len(measured):
        return float(np.median(measured))
    return float(np.mean(bounds)) if len(bounds) else None
