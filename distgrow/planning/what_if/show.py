"""The table of what other schedules would have come to, in 80 columns, or as JSON."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from distgrow.core.counted import counted
from distgrow.planning.what_if.outlook import Outlook, what_if
from distgrow.report.planned import Prospect
from distgrow.report.runs import read
from distgrow.tracking.pace import duration

WIDTH = 80


def show(
    run: str | Sequence[str],
    policies: Sequence[str] = (),
    *,
    everything: bool = False,
    metric: str | None = None,
    as_json: bool = False,
) -> Outlook:
    """Print what other schedules would have come to, the least loss first; for the other arguments see what_if.

    Args:
        run: The folder of a run, or of several: the first has the budget, the law is fitted to all.
        policies: Schedules.
        everything: Whether to add every schedule that does not measure.
        metric: A metric of the test set.
        as_json: Whether to print JSON.

    Raises:
        ConfigError: There is no such run, it shows too little, or a policy cannot be carried out.
    """
    record, *beside = read([run] if isinstance(run, str) else run)
    found = what_if(record, policies, beside=beside, everything=everything, metric=metric)
    if as_json:
        print(json.dumps(values(found), indent=2))
        return found
    console, text = Console(width=WIDTH, highlight=False), Console(highlight=False, soft_wrap=True)
    console.print(_table(found))
    for line in _notes(found):
        text.print(line, markup=False)
    return found


def values(found: Outlook) -> dict[str, Any]:
    """Return an outlook as JSON has it."""
    return {
        "run": found.name,
        "beside": [asdict(past) for past in found.beside],
        "metric": found.metric,
        "samples": found.seen.samples,
        "law": asdict(found.fit.law),
        "residual": found.fit.error,
        "recorded": {"loss": found.loss, "updates": found.updates, "seconds": found.seconds},
        "schedules": [asdict(prospect) for prospect in found.prospects],
        "left_out": dict(found.left_out),
    }


def _table(found: Outlook) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("schedule", found.metric, "90 %", "updates", "×", "largest\nbatch", "time"):
        table.add_column(name, justify="left" if name == "schedule" else "right", vertical="bottom", overflow="fold")
    rows: list[tuple[float, list[str]]] = [(each.loss, _row(each, found.updates)) for each in found.prospects]
    if found.ended:
        own = ["this run", f"{found.loss:.4g}", "", f"{found.updates:,}", "1.00", "", duration(found.seconds)]
        rows.append((found.loss, own))
    for past in found.beside:
        if past.ended:
            ratio = f"{past.updates / found.updates:.2f}"
            own = [past.name, f"{past.loss:.4g}", "", f"{past.updates:,}", ratio, "", duration(past.seconds)]
            rows.append((past.loss, own))
    for _, row in sorted(rows, key=lambda row: row[0]):
        table.add_row(*row)
    return table


def _row(each: Prospect, updates: int) -> list[str]:
    time = "—" if each.seconds is None else duration(each.seconds)
    interval, ratio = f"{each.low:.4g} – {each.high:.4g}", f"{each.updates / updates:.2f}"
    return [each.name, f"{each.loss:.4g}", interval, f"{each.updates:,}", ratio, f"{each.batch:,}", time]


def _notes(found: Outlook) -> list[str]:
    """Return what a reader of the table has to know."""
    law = found.fit.law
    weight = "·(L∞ + A·T^-s)" if law.falling is not None else ""
    others = (
        f" of {found.name}, and to those of {', '.join(past.name for past in found.beside)}" if found.beside else ""
    )
    notes = [
        f"loss = {law.floor:.4g} + {law.scale:.3g}·T^-{law.power:.2f} + {law.noise:.3g}·Σ K·η²/b{weight}, K(t) = "
        f"(t/{law.unit:.3g} + 1)^-{law.decay:.2f}, fitted to {counted(len(found.seen.losses), 'value')} of "
        f"{found.metric}"
        f"{others}; beyond their noise it misses them by {found.fit.error:.2g}",
    ]
    if law.balance:
        notes.append(f"for η stands η·√(b/(b + {law.balance:.3g})), as steps of this optimizer are normalised")
    if found.pace is None:
        notes.append(f"no times, as the pace is not known: {found.why_no_pace}")
    notes += [f"left out: {name}: {why}" for name, why in found.left_out.items()]
    return notes
