"""What a run's updates would have taken with its first batch throughout: how many, and in what time."""

from dataclasses import dataclass

import numpy as np

from distgrow.report.log import Array
from distgrow.report.runs import Record

#: Updates of the first batch whose median counts.
ENOUGH = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """Hold serial updates and the seconds of computing them, None if the step lines do not say."""

    updates: int
    seconds: float | None


def growing(record: Record) -> Costs:
    """Return the run's own costs, every update as long as the median one of its batch and world.

    A hiccup is no cost of growth.
    """
    steps = record.steps
    _, kind = np.unique(steps["batch"] + 1j * np.nan_to_num(steps["world"]), return_inverse=True)
    updates = np.diff(steps["samples"], prepend=0) / steps["batch"]  # also those without a line (run.log_every)
    each_s = record.seconds()
    seconds = sum(updates[lines].sum() * _median(each_s[lines]) for lines in _groups(kind))
    return Costs(updates=record.updates, seconds=float(seconds) if np.isfinite(seconds) else None)


def constant(record: Record) -> Costs:
    """Return the costs of as many applied evaluations in updates of the first batch, at the run's median time of it."""
    updates, steps = -(-record.ledger.applied // record.first_batch), record.steps
    same = np.flatnonzero((steps["batch"] == record.first_batch) & (steps["world"] == steps["world"][0]))
    each = _median(record.seconds()[same]) if len(same) >= ENOUGH else np.nan
    return Costs(updates=updates, seconds=updates * each if np.isfinite(each) else None)


def _groups(kind: Array) -> list[Array]:
    """Return the indices of each kind."""
    order = np.argsort(kind, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(kind[order])) + 1)


def _median(seconds: Array) -> float:
    """Return the median of the seconds that are known; NaN if none are."""
    known = seconds[np.isfinite(seconds)]
    return float(np.median(known)) if len(known) else np.nan


def comparison(record: Record, update_s: float | None) -> list[list[str]]:
    """Return rows of what, the run, the constant batch, how many times as much.

    `update_s` is the seconds of an update, whatever its batch, if they are to be compared.
    """
    ours, theirs = growing(record), constant(record)
    rows = [["serial updates", f"{ours.updates:,}", f"{theirs.updates:,}", times(theirs.updates, ours.updates)]]
    if ours.seconds and theirs.seconds:
        ratio = times(theirs.seconds, ours.seconds)
        rows.append(["seconds of updates", f"{ours.seconds:,.1f}", f"{theirs.seconds:,.1f}", ratio])
    if update_s is not None:
        seconds = [costs.updates * update_s for costs in (ours, theirs)]
        label = f"seconds at {update_s:g} s an update"
        rows.append([label, f"{seconds[0]:,.1f}", f"{seconds[1]:,.1f}", times(seconds[1], seconds[0])])
    return rows


def times(one: float, other: float) -> str:
    """Return how many times `other` goes into `one`."""
    return f"{one / other:,.1f} ×" if other else "—"


def assumption(record: Record, update_s: float | None) -> str:
    """Return what the comparison takes for granted."""
    parts = [f"Assumed: the constant batch of {record.first_batch:,} needs as many applied evaluations"]
    if constant(record).seconds is not None:
        parts.append("every update takes as long as this run's median update of its batch")
    if update_s is not None:
        parts.append(f"or {update_s:g} s, as asked for, whatever the batch")
    return ", ".join(parts) + "."
