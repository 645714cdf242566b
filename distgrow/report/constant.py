"""What a run's updates would have taken with its first batch throughout: how many, and seconds where its own tell."""

from dataclasses import dataclass

import numpy as np

from distgrow.report.runs import Record

#: Updates of one batch whose median counts.
ENOUGH = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """Serial updates and their seconds of computing; None where the step lines do not tell."""

    updates: int
    seconds: float | None


def growing(record: Record) -> Costs:
    """The run itself: every update as long as the step line that tells of it (with run.log_every, of its last)."""
    share = np.diff(record.steps["samples"], prepend=0) / record.steps["batch"]
    seconds = share * record.seconds()
    known = np.isfinite(seconds).all()
    return Costs(updates=record.updates, seconds=float(seconds.sum()) if known else None)


def constant(record: Record) -> Costs:
    """As many applied evaluations in updates of the first batch, each as long as the run's own median one."""
    updates = -(-record.ledger.applied // record.first_batch)
    steps = record.steps
    same = (steps["batch"] == record.first_batch) & (steps["world"] == steps["world"][0])
    seconds = record.seconds()[same]
    seconds = seconds[np.isfinite(seconds)]
    each = float(np.median(seconds)) if len(seconds) >= ENOUGH else None
    return Costs(updates=updates, seconds=None if each is None else updates * each)


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
        parts.append("each of its updates takes as long as this run's median update of that batch")
    if update_s is not None:
        parts.append(f"or {update_s:g} s, as asked for, whatever the batch")
    return ", ".join(parts) + "."
