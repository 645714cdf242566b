"""The part of a report about one run, as HTML: its ledger, plan, costs, stages, events and config; draws nothing."""

from collections.abc import Iterable, Iterator, Sequence
from html import escape
from itertools import pairwise

import numpy as np

from distgrow.core.progress import Ledger
from distgrow.report import constant
from distgrow.report.log import PARTS, Event
from distgrow.report.marks import MARKS
from distgrow.report.planned import Planned, comparison
from distgrow.report.runs import Record

MOST_ROWS = 200
_SHAPE = ("stage", "batch", "world", "micro", "accum")
_STAGES = (
    *("stage", "batch = world × micro × accum", "learning rate", "updates", "samples", "epochs"),
    *("seconds", "SFO", "samples by then"),
)
_EVENTS = ("event", "step", "SFO", "seconds", "")


def section(record: Record, planned: Planned | None, update_s: float | None) -> str:
    """Everything about one run."""
    shares = table(["", "evaluations", "share"], _shares(record.ledger), kind="parts")
    facts = [f"<div><h3>Where they went</h3>{shares}</div>"]
    if planned is not None:
        compared = table(["", "planned", "actual"], comparison(record, planned))
        facts.append(f"<div><h3>Planned and actual</h3>{compared}</div>")
    costs = table(["", "this run", "constant", ""], constant.comparison(record, update_s))
    note = f'<p class="note">{escape(constant.assumption(record, update_s))}</p>'
    facts.append(f"<div><h3>At a constant batch of {record.first_batch:,}</h3>{costs}{note}</div>")
    parts = [
        f"<section><h2>{escape(record.name)}</h2>",
        f"<p>{_headline(record)}</p>",
        "<h3>Gradient evaluations (SFO)</h3>",
        ledger_bar(record.ledger),
        f'<div class="facts">{"".join(facts)}</div>',
        "<h3>Stages</h3>",
        table(*stage_table(record, planned)),
        *_events(record),
        f'<details><summary>config.yaml</summary><pre tabindex="0">{escape(record.config)}</pre></details></section>',
    ]
    return "\n".join(parts)


def table(head: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "plain") -> str:
    """An HTML table, escaped, that scrolls on its own where it is too wide."""
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    lines = ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows]
    body = "\n".join(f"<tr>{line}</tr>" for line in lines)
    whole = f'<table class="{kind}"><thead><tr>{top}</tr></thead><tbody>\n{body}\n</tbody></table>'
    return f'<div class="wide">{whole}</div>'


def _headline(record: Record) -> str:
    ours, theirs = record.updates, constant.constant(record).updates
    return (
        f"{ours:,} serial updates and {record.ledger.total:,} gradient evaluations; at the constant first batch of "
        f"{record.first_batch:,}, the applied ones are {theirs:,} serial updates: {theirs / ours:,.1f} × as many."
    )


# ── the ledger ──────────────────────────────────────────────────────────────────────────────────────────────────────


def ledger_bar(ledger: Ledger) -> str:
    """One bar, a segment for each part that is not 0; segments differ by pattern, and wide ones are labelled."""
    parts = {part: getattr(ledger, part) for part in PARTS if getattr(ledger, part)}
    shares = {part: f"{part} {count / ledger.total:.1%}" for part, count in parts.items()}
    segments = "".join(
        f'<span class="{part}" style="flex-grow: {count / ledger.total:.6f}" title="{shares[part]}">'
        f"{f'<b>{shares[part]}</b>' if count >= 0.2 * ledger.total else ''}</span>"
        for part, count in parts.items()
    )
    return f'<div class="bar" role="img" aria-label="{", ".join(shares.values())}">{segments}</div>'


def _shares(ledger: Ledger) -> Iterator[list[str]]:
    for part in (*PARTS, "total"):
        yield [part, f"{getattr(ledger, part):,}", f"{getattr(ledger, part) / ledger.total:.2%}"]


# ── stages and events ───────────────────────────────────────────────────────────────────────────────────────────────


def stage_table(record: Record, planned: Planned | None = None) -> tuple[list[str], list[list[str]]]:
    """The head and the rows of the stage table; the last column is there where the plan tells each stage's end."""
    rows = shorten(list(stages(record)), MOST_ROWS)
    if planned is None or not planned.after:
        return list(_STAGES), rows
    ends = {f"{stage:,}": f"{samples:,}" for stage, samples in planned.after.items()}
    return [*_STAGES, "planned by then"], [[*row, ends.get(row[0], "")] for row in rows]


def stages(record: Record) -> Iterator[list[str]]:
    """A row of text for each stage, and one more for each change of its world or micro-batch on a resume."""
    begins: list[Event] = []
    for event in record.of("stage"):
        if not begins or any(event[key] != begins[-1][key] for key in _SHAPE):
            begins.append(event)
    rates = _rates(record)
    for event, end in pairwise([*begins, record.last]):
        yield [
            f"{event['stage']:,}",
            f"{event['batch']:,} = {event['world']:,} × {event['micro']:,} × {event['accum']:,}",
            rates.get((event["stage"], event["batch"]), f"{event['lr']:.4g}"),
            f"{end['step'] - event['step']:,.0f}",
            f"{end['samples'] - event['samples']:,.0f}",
            f"{event['samples'] / record.epoch:,.2f} – {end['samples'] / record.epoch:,.2f}",
            f"{end['time_s'] - event['time_s']:,.1f}",
            f"{end['sfo'] - event['sfo']:,.0f}",
            f"{end['samples']:,.0f}",
        ]


def _rates(record: Record) -> dict[tuple[int, int], str]:
    """The first and last learning rate of each stage and batch."""
    stage, batch, rate = (record.steps[key] for key in ("stage", "batch", "lr"))
    changes = np.flatnonzero((np.diff(stage) != 0) | (np.diff(batch) != 0))
    ends: dict[tuple[int, int], list[str]] = {}
    for first, last in zip([0, *(changes + 1)], [*changes, len(stage) - 1], strict=True):
        shown = [f"{rate[first]:.4g}", f"{rate[last]:.4g}"]
        ends.setdefault((int(stage[first]), int(batch[first])), shown)[1] = shown[1]
    return {key: first if first == last else f"{first} – {last}" for key, (first, last) in ends.items()}


def _events(record: Record) -> list[str]:
    """What the plots mark, beside the stages, in the order of the run."""
    labels = {mark.kind: mark.label for mark in MARKS if mark.kind != "stage"}
    found = [event for event in record.events if event["event"] in labels]
    rows = [[labels[event["event"]], *_place(event), _detail(event)] for event in found]
    return ["<h3>Events</h3>", table(_EVENTS, shorten(rows, MOST_ROWS))] if rows else []


def _place(event: Event) -> list[str]:
    return [f"{event['step']:,}", f"{event['sfo']:,}", f"{event['time_s']:,.1f}"]


def _detail(event: Event) -> str:
    known = {
        "resume": ("checkpoint", "from {checkpoint}"),
        "resize": ("new", "{old} → {new} workers"),
        "skip": ("batch", "batch of {batch:,}"),
        "oom": ("micro", "micro-batches of {micro:,} rows"),
    }
    key, text = known[event["event"]]
    return text.format_map({"old": "?", **event}) if key in event else ""


def shorten(rows: list[list[str]], most: int) -> list[list[str]]:
    """The first and last rows where there are more than `most`."""
    if len(rows) <= most:
        return rows
    head, tail = rows[: most - most // 4], rows[-(most // 4) :]
    return [*head, [f"… {len(rows) - most:,} more"], *tail]
