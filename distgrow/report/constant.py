"""What a run's updates would have taken with its first batch throughout: how many, and seconds where its own tell."""

from dataclasses import dataclass

import numpy as np

from distgrow.report.log import Array
from distgrow.report.runs import Record

#: Updates of the first batch whose median counts.
ENOUGH = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """Serial updates, and the seconds of computing them; None where the step lines do not tell."""

    updates: int
    seconds: float | None


def growing(record: Record) -> Costs:
    """The run itself, every update as long as the median one of its batch and world: a hiccup is no cost of growth."""
    steps = record.steps
    _, kind = np.unique(steps["batch"] + 1j * np.nan_to_num(steps["world"]), return_inverse=True)
    updates = np.diff(steps["samples"], prepend=0) / steps["batch"]  # also those without a line (run.log_every)
    each_s = record.seconds()
    seconds = sum(updates[lines].sum() * _median(each_s[lines]) for lines in _groups(kind))
    return Costs(updates=record.updates, seconds=float(seconds) if np.isfinite(seconds) else None)


def constant(record: Record) -> Costs:
    """As many applied evaluations in updates of the first batch, each as long as the run's own median one."""
    updates, steps = -(-record.ledger.applied // record.first_batch), record.steps
    same = np.flatnonzero((steps["batch"] == record.first_batch) & (steps["world"] == steps["world"][0]))
    each = _median(record.seconds()[same]) if len(same) >= ENOUGH else np.nan
    return Costs(updates=updates, seconds=updates * each if np.isfinite(each) else None)


def _groups(kind: Array) -> list[Array]:
    """The indices of each kind."""
    order = np.argsort(kind, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(kind[order])) + 1)


def _median(seconds: Array) -> float:
    """The median of the seconds that are known; NaN where none are."""
    known = seconds[np.isfinite(seconds)]
    return float(np.median(known)) if len(known) else np.nan


def comparison(record: Record, update_s: float | None) -> list[list[str]]:
    """Rows of what, the run, the constant batch, how many times as much; `update_s` is given, whatever the batch."""
    ours, theirs = growing(record), constant(record)
    rows = [["serial updates", f"{ours.updates:,}", f"{theirs.updates:,}", f"{theirs.updates / ours.updates:,.1f} ×"]]
    if ours.seconds and theirs.seconds:
        times = f"{theirs.seconds / ours.seconds:,.1f} ×"
        rows.append(["seconds of updates", f"{ours.seconds:,.1f}", f"{theirs.seconds:,.1f}", times])
    if update_s is not None:
        seconds = [costs.updates * update_s for costs in (ours, theirs)]
        times = f"{seconds[1] / seconds[0]:,.1f} ×"
        rows.append([f"seconds at {update_s:g} s an update", f"{seconds[0]:,.1f}", f"{seconds[1]:,.1f}", times])
    return rows


def assumption(record: Record, update_s: float | None) -> str:
    """What the comparison takes for granted."""
    parts = [f"Assumed: the constant batch of {record.first_batch:,} needs as many applied evaluations"]
    if constant(record).seconds is not None:
        parts.append("every update takes as long as this run's median update of its batch")
    if update_s is not None:
        parts.append(f"or {update_s:g} s, as asked for, whatever the batch")
    return ", ".join(parts) + "."
