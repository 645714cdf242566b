"""What a report says of one run, as texts and rows of tables; knows no HTML and draws nothing."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from distgrow.core.counted import counted
from distgrow.core.progress import Ledger
from distgrow.report import constant
from distgrow.report.marks import MARKS
from distgrow.report.planned import Planned, comparison, prospects
from distgrow.report.runs import Record
from distgrow.tracking.base_event import PARTS, Event
from distgrow.tracking.branch_events import BranchTest
from distgrow.tracking.events import OutOfMemory, ParameterNoise, Resize, Resume, Skip, Stage
from distgrow.tracking.pace import SmoothedRate, duration, standing

MOST_ROWS = 200
#: The least share of the ledger's bar that holds a label.
WIDE = 0.25
_STAGES = (
    *("stage", "batch = world × micro × accum", "learning rate", "updates", "samples", "epochs"),
    *("seconds", "SFO", "samples by then"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Hold the heads of a table's columns and its rows."""

    head: list[str]
    rows: list[list[str]]


def section(record: Record, planned: Planned | None, update_s: float | None) -> dict[str, Any]:
    """Return everything about one run, by the names that the templates use."""
    return {
        "name": record.name,
        "state": state(record),
        "sentence": sentence(record),
        "total": f"{record.ledger.total:,}",
        "ledger": ledger(record.ledger),
        "planned": None if planned is None else comparison(record, planned),
        "prospects": None if planned is None else prospects(planned),
        "first_batch": f"{record.first_batch:,}",
        "constant": constant.comparison(record, update_s),
        "assumption": constant.assumption(record, update_s),
        "stages": stage_table(record, planned),
        "events": shorten(list(_events(record)), MOST_ROWS),
        "parameters": parameter_table(record),
        "sample": record.sample,
        "config": record.config,
    }


def state(record: Record) -> str:
    """Return how the run ended, or how far it has come, e.g. "38 %, 30 s left"."""
    if record.ended:
        return record.state
    rate = SmoothedRate()
    samples, seconds = record.steps["samples"], record.steps["time_s"]
    for index in np.flatnonzero(seconds >= seconds[-1] - 2 * SmoothedRate.WINDOW_S):
        rate.add(samples[index], seconds[index])
    stands = standing(record.ledger.applied, record.budget, rate.samples_per_s())
    return f"not ended: {stands}" if stands else record.state


def sentence(record: Record) -> str:
    """Return the results in words."""
    ours, theirs = record.updates, constant.constant(record).updates
    tested = ", ".join(f"{name} {value:.4g}" for name, value in record.metrics.items())
    parts = [
        f"{counted(ours, 'serial update')}, {counted(record.ledger.total, 'gradient evaluation')} (SFO), "
        f"{record.last.samples / record.epoch:,.2f} epochs, {duration(record.last.time_s)}."
    ]
    if (tokens := _tokens(record)) is not None:
        parts.append(tokens)
    if (pruned := _pruned(record)) is not None:
        parts.append(pruned)
    if tested:
        parts.append(f"Last evaluation: {tested}.")
    if theirs != ours:
        parts.append(
            f"At the constant first batch of {record.first_batch:,} the applied evaluations are {theirs:,} serial "
            f"updates: {constant.times(theirs, ours)} as many."
        )
    return " ".join(parts)


def _tokens(record: Record) -> str | None:
    """Return the tokens of a run and its middle rate in words; None if it has counted none."""
    tokens, rate = record.steps["tokens"], record.steps["tokens_per_s"]
    if not len(tokens) or not np.isfinite(tokens[-1]):
        return None
    mfu = record.steps["mfu"]
    share = f" at an MFU of {np.nanmedian(mfu):.1%}" if len(mfu) and np.isfinite(mfu).any() else ""
    return f"{counted(f'{tokens[-1]:,.0f}', 'token')}, {np.nanmedian(rate):,.0f} tokens/s{share}."


def _pruned(record: Record) -> str | None:
    """Return what a model that was pruned, or has experts, has cost, in words; None if all its weights were used."""
    steps = record.steps
    if not len(steps["compute"]) or not np.isfinite(compute := steps["compute"][-1]):
        return None
    applied = steps["sfo"][-1] - sum(steps[f"sfo_{part}"][-1] for part in PARTS[1:])
    return (
        f"A density of {steps['density'][-1]:.4g} in the end, {compute / applied:.4g} on average: a compute of "
        f"{counted(f'{compute:,.0f}', 'evaluation')} with all weights."
    )


# ── the ledger ──────────────────────────────────────────────────────────────────────────────────────────────────────


def ledger(spent: Ledger) -> dict[str, Any]:
    """Return the parts of the ledger that are not 0, and the names of those that are, if every run may have them."""
    counts = {part: getattr(spent, part) for part in PARTS}
    whole = max(1, spent.total)
    parts = [
        {
            "name": part,
            "count": f"{count:,}",
            "share": f"{count / whole:.6f}",
            "per_cent": f"{count / whole:.2%}",
            "label": f"{part} {count / whole:.1%}",
            "wide": count >= WIDE * whole,
        }
        for part, count in counts.items()
        if count
    ]
    words = [
        "spent on probes" if part == "probe" else part
        for part, count in counts.items()
        if not count and part != "extrapolated"
    ]
    return {
        "spent": parts,
        "unspent": " or ".join([", ".join(words[:-1]), words[-1]][len(words) < 2 :]) if words else "",
    }


# ── noise by parameter ──────────────────────────────────────────────────────────────────────────────────────────────


def parameter_table(record: Record) -> Table | None:
    """Return the noise of each parameter at the first and the last time that it was logged; None if it was not."""
    logged = record.of(ParameterNoise)
    if not logged:
        return None
    first, last = logged[0], logged[-1]
    began = dict(zip(first.names, zip(first.grad_sq, first.noise_trace, strict=True), strict=True))
    rows = [
        [name, _figure(square), _figure(trace), _scale(*began.get(name, (None, None))), _scale(square, trace)]
        for name, square, trace in zip(last.names, last.grad_sq, last.noise_trace, strict=True)
    ]
    head = ["parameter", "|∇f|²", "tr Σ", f"noise scale at step {first.step:,}", f"at step {last.step:,}"]
    return Table(head=head, rows=shorten(rows, MOST_ROWS))


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"


def _scale(grad_sq: float | None, trace: float | None) -> str:
    """Return tr Σ/|∇f|² in samples, ∞ where noise hides the gradient."""
    if grad_sq is None or trace is None:
        return "–"
    return f"{trace / grad_sq:,.3g}" if grad_sq > 0 else "∞"


# ── stages and events ───────────────────────────────────────────────────────────────────────────────────────────────


def stage_table(record: Record, planned: Planned | None = None) -> Table:
    """Return the stages; the last column is there if the plan gives each stage's end."""
    rows = shorten(list(stages(record)), MOST_ROWS)
    if planned is None or not planned.after:
        return Table(head=list(_STAGES), rows=rows)
    ends = {f"{stage:,}": f"{samples:,}" for stage, samples in planned.after.items()}
    return Table(head=[*_STAGES, "planned by then"], rows=[[*row, ends.get(row[0], "")] for row in rows])


def stages(record: Record) -> Iterator[list[str]]:
    """Yield a row of text for each stage, and one more for each change of its world or micro-batch on a resume."""
    begins: list[Stage] = []
    for event in record.of(Stage):
        if not begins or _shape(event) != _shape(begins[-1]):
            begins.append(event)
    rates = _rates(record)
    for event, end in pairwise([*begins, record.last]):
        assert isinstance(event, Stage)
        yield [
            f"{event.stage:,}",
            f"{event.batch:,} = {event.world:,} × {event.micro:,} × {event.accum:,}",
            rates.get((event.stage, event.batch), f"{event.lr:.4g}"),
            f"{end.step - event.step:,}",
            f"{end.samples - event.samples:,}",
            f"{event.samples / record.epoch:,.2f} – {end.samples / record.epoch:,.2f}",
            f"{end.time_s - event.time_s:,.1f}",
            f"{(end.sfo or 0) - (event.sfo or 0):,}",
            f"{end.samples:,}",
        ]


def _shape(stage: Stage) -> tuple[int, ...]:
    return stage.stage, stage.batch, stage.world, stage.micro, stage.accum


def _rates(record: Record) -> dict[tuple[int, int], str]:
    """Return the first and last learning rate of each stage and batch."""
    stage, batch, rate = (record.steps[key] for key in ("stage", "batch", "lr"))
    changes = np.flatnonzero((np.diff(stage) != 0) | (np.diff(batch) != 0))
    ends: dict[tuple[int, int], list[str]] = {}
    for first, last in zip([0, *(changes + 1)], [*changes, len(stage) - 1], strict=True):
        shown = [f"{rate[first]:.4g}", f"{rate[last]:.4g}"]
        ends.setdefault((int(stage[first]), int(batch[first])), shown)[1] = shown[1]
    return {key: first if first == last else f"{first} – {last}" for key, (first, last) in ends.items()}


def _events(record: Record) -> Iterator[list[str]]:
    """Yield what the plots mark, beside the stages, in the order of the run."""
    labels = {mark.kind: mark.label for mark in MARKS if mark.kind is not Stage}
    for event in record.of(*labels):
        place = [f"{event.step:,}", f"{event.sfo or 0:,}", f"{event.time_s:,.1f}"]
        yield [labels[type(event)], *place, _detail(event)]


def _detail(event: Event) -> str:
    match event:
        case Resume(checkpoint=str(name)):
            return f"from {name}"
        case Resize(old=old, new=int(new)):
            return f"{'?' if old is None else old} → {counted(new, 'worker')}"
        case BranchTest():
            return _verdict(event)
        case Skip(late=True, delay=int(delay)):
            return f"gradient dropped, {counted(delay, 'update')} late"
        case Skip(batch=batch, empty=empty):
            return f"batch of {batch:,}{', without items' if empty else ''}"
        case OutOfMemory(micro=int(micro)):
            return f"micro-batches of {counted(micro, 'row')}"
        case _:
            return ""


def _verdict(test: BranchTest) -> str:
    """Return which batch has gone on, and the differences of the others' losses to the first's."""
    pairs = list(zip(test.batches, test.differences, test.errors, strict=False))[1:]
    told = [
        f"{batch:,}: {gap:+.4g} ± {error:.2g}" for batch, gap, error in pairs if gap is not None and error is not None
    ]
    return f"{test.batch:,} of {' and '.join(f'{batch:,}' for batch in test.batches)} goes on ({', '.join(told)})"


def shorten(rows: list[list[str]], most: int) -> list[list[str]]:
    """Return the first and last rows if there are more than `most`."""
    if len(rows) <= most:
        return rows
    head, tail = rows[: most - most // 4], rows[-(most // 4) :]
    return [*head, [f"… {len(rows) - most:,} more"], *tail]
