"""The report's HTML page, which needs no other file: results, plots, and each run's stages, ledger and config."""

import base64
import string
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from itertools import pairwise
from typing import Any

from distgrow.progress import Ledger
from distgrow.report.plots import AXES
from distgrow.report.runs import PARTS, Record, metrics

STAGE_ROWS = 200
_SHAPE = ("stage", "batch", "world", "micro", "accum")
_STAGES = ("stage", "batch = world × micro × accum", "learning rate", "updates", "samples", "epochs", "seconds")
_PAGE = string.Template("""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title><style>
:root { color-scheme: light dark }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: auto; padding: 1rem; overflow-wrap: anywhere }
img { width: 100%; max-width: 42rem; height: auto; border-radius: 4px; background: #fff }
h1, h2 { line-height: 1.2; font-size: 1.5rem } h2 { margin-top: 2rem } summary { margin-top: 1rem }
.wide { overflow-x: auto } pre { overflow-x: auto; font-size: 85% }
table { border-collapse: collapse; white-space: nowrap; font-variant-numeric: tabular-nums }
th, td { padding: .2rem .7rem; text-align: right; border-bottom: 1px solid #8885 }
th:first-child, td:first-child { padding-left: 0; text-align: left }
</style></head><body><h1>$title</h1>
$body
</body></html>
""")


def page(records: Sequence[Record], plots: dict[str, bytes]) -> str:
    """The whole page; `plots` are PNGs by the file names of AXES."""
    title = escape(f"distgrow report: {', '.join(record.name for record in records)}")
    images = [_image(axis.title, plots[axis.file]) for axis in AXES.values()]
    return _PAGE.substitute(title=title, body="\n".join([_results(records), *images, *map(_section, records)]))


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """An HTML table, escaped, that scrolls on its own where it is too wide."""
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    lines = ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows]
    body = "\n".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="wide"><table><thead><tr>{top}</tr></thead><tbody>\n{body}\n</tbody></table></div>'


def _image(title: str, content: bytes) -> str:
    data = base64.b64encode(content).decode()
    return f'<h2>{escape(title)}</h2>\n<p><img alt="{escape(title)}" src="data:image/png;base64,{data}"></p>'


def _results(records: Sequence[Record]) -> str:
    names = metrics(records)
    rows: list[list[str]] = []
    for record in records:
        last, found = record.events[-1], record.metrics
        state = last["reason"] if last["event"] == "end" else "not ended"
        tested = [f"{found[name]:.4g}" if name in found else "—" for name in names]
        spent = [f"{last['step']:,}", f"{record.ledger.total:,}", f"{last['samples'] / record.epoch:,.2f}"]
        rows.append([record.name, *tested, *spent, f"{last['time_s']:,.1f}", state])
    return table(["run", *(f"test {name}" for name in names), "steps", "SFO", "epochs", "seconds", "state"], rows)


def _section(record: Record) -> str:
    """Everything about one run."""
    first = next(event["batch"] for event in record.events if "batch" in event)
    steps, total = record.events[-1]["step"], record.ledger.total
    serial = -(-total // first)
    return "\n".join(
        [
            f"<h2>{escape(record.name)}</h2>",
            f"<p>{steps:,} serial steps took {total:,} gradient evaluations. At the constant first batch of {first:,}, "
            f"as many evaluations are {serial:,} serial steps: {serial / steps:,.1f} × as many.</p>",
            "<h3>Stages</h3>",
            table(_STAGES, shorten(list(stages(record)), STAGE_ROWS)),
            "<h3>Gradient evaluations (SFO)</h3>",
            table(["", "evaluations", "share"], _shares(record.ledger)),
            f"<details><summary>config.yaml</summary><pre>{escape(record.config)}</pre></details>",
        ]
    )


def _shares(ledger: Ledger) -> Iterator[list[str]]:
    for part in (*PARTS, "total"):
        yield [part, f"{getattr(ledger, part):,}", f"{getattr(ledger, part) / ledger.total:.2%}"]


def stages(record: Record) -> Iterator[list[str]]:
    """A row of text for each stage, and one more for each change of its world or micro-batch on a resume."""
    begins: list[dict[str, Any]] = []
    for event in record.events:
        if event["event"] == "stage" and (not begins or any(event[key] != begins[-1][key] for key in _SHAPE)):
            begins.append(event)
    rates = _rates(record)
    for event, end in pairwise([*begins, record.events[-1]]):
        yield [
            f"{event['stage']:,}",
            f"{event['batch']:,} = {event['world']:,} × {event['micro']:,} × {event['accum']:,}",
            rates.get((event["stage"], event["batch"]), f"{event['lr']:.4g}"),
            f"{end['step'] - event['step']:,}",
            f"{end['samples'] - event['samples']:,}",
            f"{event['samples'] / record.epoch:,.2f} – {end['samples'] / record.epoch:,.2f}",
            f"{end['time_s'] - event['time_s']:,.1f}",
        ]


def _rates(record: Record) -> dict[tuple[int, int], str]:
    """The first and last learning rate of each stage and batch."""
    ends: dict[tuple[int, int], list[str]] = {}
    for event in record.events:
        if event["event"] == "step":
            shown = f"{event['lr']:.4g}"
            ends.setdefault((event["stage"], event["batch"]), [shown, shown])[1] = shown
    return {key: first if first == last else f"{first} – {last}" for key, (first, last) in ends.items()}


def shorten(rows: list[list[str]], most: int) -> list[list[str]]:
    """The first and last rows where there are more than `most`."""
    if len(rows) <= most:
        return rows
    head, tail = rows[: most - most // 4], rows[-(most // 4) :]
    return [*head, [f"… {len(rows) - most:,} more"], *tail]
