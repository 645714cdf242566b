"""The report of runs: plots and one HTML page, made from what their folders hold; knows no torch and no training."""

import base64
import io
import string
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, ScalarFormatter, StrMethodFormatter

from distgrow.progress import Ledger
from distgrow.run import RunFolder, storing
from distgrow.spec import ConfigError
from distgrow.track import history, read_events

Array = np.ndarray[Any, np.dtype[Any]]
Events = Sequence[dict[str, Any]]

#: Key of every event → file name and label of the plot against it.
AXES = {
    "sfo": ("against_sfo.png", "gradient evaluations of single samples (SFO)"),
    "step": ("against_steps.png", "steps (applied updates)"),
    "time_s": ("against_seconds.png", "seconds of training, crashes' lost work included"),
}
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")  # Okabe and Ito, 2008
DASHES = ("-", "--", "-.")
STAGE_ROWS = 200


def write(runs: list[str], out: str | None) -> str:
    """Plot runs together and describe each; the text names the files written. ConfigError where a run cannot be read.

    The files go into `out`, or where that is None into the first run's folder.
    """
    records = read(runs)
    folder = Path(runs[0] if out is None else out)
    plots = {name: plot(records, axis, label) for axis, (name, label) in AXES.items()}
    files = {**plots, "report.html": page(records, plots).encode()}
    with storing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (folder / name).write_bytes(content)
    return "\n".join(["wrote", *(f"  {folder / name}" for name in files)])


# ── what the folders hold ───────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One run: its config as written, its events as if it had never crashed, each with the SFO total at its time."""

    name: str
    config: str
    events: Events
    ledger: Ledger

    @property
    def metrics(self) -> dict[str, float]:
        """The last evaluation of the test set; empty before one."""
        known = {"event", "step", "samples", "time_s", "epoch", "sfo"}
        last = next((event for event in reversed(self.events) if event["event"] == "eval"), {})
        return {key: value for key, value in last.items() if key not in known and isinstance(value, int | float)}

    @property
    def epoch(self) -> float:
        """Samples of one pass over the training set."""
        last = next(event for event in reversed(self.events) if event["event"] == "step")
        return last["samples"] / last["epoch"]


def read(runs: Iterable[str]) -> list[Record]:
    """The runs, each once, named by their folders (by the whole path where two folders have one name)."""
    paths = [Path(run) for run in dict.fromkeys(runs)]
    count = Counter(path.resolve().name for path in paths)
    names = [path.resolve().name if count[path.resolve().name] == 1 else str(path) for path in paths]
    return [_read(path, name) for path, name in zip(paths, names, strict=True)]


def _read(path: Path, name: str) -> Record:
    folder = RunFolder(path)
    for file in (folder.config, folder.metrics):
        if not file.is_file():
            raise ConfigError(f"{file} does not exist: give the folder that run.dir named in `distgrow train`")
    try:
        config, recorded = folder.config.read_text(encoding="utf-8"), read_events(folder.metrics)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}; repair or remove that line or file") from error
    events, ledger = _counted(history(recorded))
    if not any(event["event"] == "step" for event in events):
        raise ConfigError(f"{folder.metrics} holds no update yet; wait for the run, or lower its run.log_every")
    return Record(name=name, config=config, events=events, ledger=ledger)


def _counted(events: Events) -> tuple[Events, Ledger]:
    """The events with `sfo` where a line lacks it, and the ledger at their end.

    Not every update has a line (run.log_every), but every line has `samples`, and these are applied or skipped.
    """
    counted: list[dict[str, Any]] = []
    ledger = Ledger()
    for event in events:
        parts = {part: event.get(f"sfo_{part}", getattr(ledger, part)) for part in _PARTS[1:]}
        ledger = Ledger(**parts, applied=event["samples"] - parts["skipped"])
        counted.append(event if "sfo" in event else {**event, "sfo": ledger.total})
    return counted, ledger


_PARTS = ("applied", "skipped", "replayed", "discarded", "probe")


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """Points in the order of the run: places on each axis, a value, the samples consumed by then and the batch."""

    places: dict[str, Array]
    values: Array
    samples: Array
    batch: Array

    def at(self, indices: Array) -> "Series":
        """Some of the points."""
        places = {axis: place[indices] for axis, place in self.places.items()}
        return Series(
            places=places, values=self.values[indices], samples=self.samples[indices], batch=self.batch[indices]
        )


def series(events: Events, kind: str, key: str) -> Series:
    """`key` of all events of a kind that have it."""
    rows = [event for event in events if event["event"] == kind and event.get(key) is not None]
    return Series(
        places={axis: np.array([row[axis] for row in rows], dtype=float) for axis in AXES},
        values=np.array([row[key] for row in rows], dtype=float),
        samples=np.array([row["samples"] for row in rows], dtype=float),
        batch=np.array([row.get("batch", 1) for row in rows], dtype=float),
    )


def smooth(points: Series, share: float = 0.03) -> Array:
    """Mean value per sample in a window of `share` of all samples around each point, narrower towards the ends.

    A window of samples holds few large batches or many small ones, which are as noisy together.
    """
    samples, batch = points.samples, points.batch
    reach = np.minimum(share / 2 * np.ptp(samples), np.minimum(samples - samples[0], samples[-1] - samples))
    low = np.searchsorted(samples, samples - reach, side="left")
    high = np.searchsorted(samples, samples + reach, side="right")
    weight, total = (np.concatenate([[0.0], np.cumsum(part)]) for part in (batch, batch * points.values))
    return (total[high] - total[low]) / (weight[high] - weight[low])


def thin(values: Array, batch: Array, most: int = 2000) -> Array:
    """Indices of about `most` points that look like all: both ends, spikes, both sides of each change of batch."""
    count, share = len(values), most // 4
    if count <= most:
        return np.arange(count)
    edges = np.flatnonzero(np.diff(batch))
    if len(edges) > share:
        edges = edges[np.linspace(0, len(edges) - 1, share).astype(int)]
    bounds = pairwise(np.linspace(0, count, share + 1).astype(int))
    spikes = [begin + pick(values[begin:end]) for begin, end in bounds for pick in (np.argmin, np.argmax)]
    return np.unique(np.concatenate([[0, count - 1], edges, edges + 1, spikes]).astype(int))


# ── plots ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """What one panel shows: a key of the events of one kind."""

    label: str
    kind: str
    key: str


def panels(records: Sequence[Record]) -> list[Panel]:
    """From top to bottom; one for each metric of the test set."""
    metrics = dict.fromkeys(name for record in records for name in sorted(record.metrics, key="loss".__ne__))
    return [
        Panel(label="training loss", kind="step", key="loss"),
        *(Panel(label=f"test {name}", kind="eval", key=name) for name in metrics),
        Panel(label="gradient norm", kind="step", key="grad_norm"),
        Panel(label="batch (samples)", kind="step", key="batch"),
        Panel(label="learning rate", kind="step", key="lr"),
    ]


def plot(records: Sequence[Record], axis: str, label: str) -> bytes:
    """A PNG of all panels against one axis, the runs laid over each other."""
    rows = panels(records)
    figure = Figure(figsize=(6.4, 0.8 + 1.75 * len(rows)), dpi=150, layout="constrained")
    axes: list[Axes] = list(figure.subplots(len(rows), sharex=True))
    for row, place in zip(rows, axes, strict=True):
        drawn = [_draw(place, row, record, axis, _look(index)) for index, record in enumerate(records)]
        _scale(place, row, np.concatenate(drawn))
    for index, record in enumerate(records):
        _mark(axes, record.events, axis, _look(index)["color"])
    axes[-1].set_xlabel(label)
    axes[-1].xaxis.set_major_formatter(StrMethodFormatter("{x:,g}") if axis == "time_s" else EngFormatter(sep=""))
    axes[-1].set_xlim(left=0)
    figure.align_ylabels(axes)
    handles, names = _legend(records)
    columns = 1 if max(map(len, names)) > 24 else min(3, len(names))
    figure.legend(handles, names, loc="outside upper center", ncols=columns, frameon=False)
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def _look(index: int) -> dict[str, Any]:
    """Colour and dashes of a run."""
    return {"color": COLOURS[index % len(COLOURS)], "linestyle": DASHES[index // len(COLOURS) % len(DASHES)]}


def _draw(place: Axes, panel: Panel, record: Record, axis: str, look: dict[str, Any]) -> Array:
    """One run's line in one panel; its values."""
    points = series(record.events, panel.kind, panel.key)
    if not len(points.values):
        return points.values
    chosen = thin(points.values, points.batch)
    few = points.at(chosen)
    x, y = few.places[axis], few.values
    if panel.kind == "eval":
        place.plot(x, y, marker=".", markersize=4, linewidth=1.2, **look)
    elif panel.key in ("batch", "lr"):  # a line tells of the update that ends there, so its value holds before it
        place.plot([0, *x], [y[0], *y], drawstyle="steps-pre", linewidth=1.6, **look)
    else:
        place.plot(x, y, linewidth=0.6, alpha=0.25, **look)
        mean = smooth(points)
        place.plot(x, mean[chosen], linewidth=1.6, marker="." if len(y) < 10 else "", **look)
    return y


def _scale(place: Axes, panel: Panel, values: Array) -> None:
    """The y axis: batches by powers of two, norms and widely spread losses by powers of ten."""
    place.set_ylabel(panel.label)
    place.grid(alpha=0.3, linewidth=0.5)
    positive = values[values > 0]
    if panel.key == "batch":
        place.set_yscale("log", base=2)
        place.yaxis.set_major_formatter(ScalarFormatter())
        place.set_ylim(positive.min() / 2, positive.max() * 2)
    elif panel.key == "lr":
        place.set_ylim(bottom=0)
    elif len(positive) and (panel.key == "grad_norm" or panel.key == "loss" and positive.max() > 10 * values.min() > 0):
        place.set_yscale("log")


def _mark(axes: Sequence[Axes], events: Events, axis: str, colour: str) -> None:
    """Dotted lines where the run was resumed, crosses above the loss where an update was skipped."""
    for event in events:
        if event["event"] == "resume":
            for place in axes:
                place.axvline(event[axis], color=colour, linestyle=":", linewidth=1.0)
    skips = np.array([event[axis] for event in events if event["event"] == "skip"], dtype=float)
    skips = skips[thin(skips, np.ones_like(skips))]
    top = axes[0].get_xaxis_transform()
    axes[0].plot(skips, np.full_like(skips, 0.95), "x", color=colour, markersize=4, transform=top)


def _legend(records: Sequence[Record]) -> tuple[list[Line2D], list[str]]:
    """Keys of the runs, and of the marks that occur; a dollar in a name is no formula."""
    kinds = {event["event"] for record in records for event in record.events}
    handles = [Line2D([], [], **_look(index)) for index in range(len(records))]
    names = [record.name.replace("$", r"\$") for record in records]
    if "resume" in kinds:
        handles.append(Line2D([], [], color="grey", linestyle=":"))
        names.append("resumed")
    if "skip" in kinds:
        handles.append(Line2D([], [], color="grey", linestyle="", marker="x"))
        names.append("update skipped")
    return handles, names


# ── the page ────────────────────────────────────────────────────────────────────────────────────────────────────────

_PAGE = string.Template("""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title><style>
:root { color-scheme: light dark }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: auto; padding: 1rem; overflow-wrap: anywhere }
img { max-width: 100%; height: auto; border-radius: 4px; background: #fff }
.wide { overflow-x: auto } pre { overflow-x: auto; font-size: 85% }
table { border-collapse: collapse; white-space: nowrap; font-variant-numeric: tabular-nums }
th, td { padding: .2rem .7rem; text-align: right; border-bottom: 1px solid #8885 }
th:first-child, td:first-child { padding-left: 0; text-align: left }
</style></head><body><h1>$title</h1>$body</body></html>
""")


def page(records: Sequence[Record], plots: dict[str, bytes]) -> str:
    """The whole page; it needs no other file."""
    title = escape(f"distgrow report: {', '.join(record.name for record in records)}")
    body = [_results(records)]
    for name, content in plots.items():
        data = base64.b64encode(content).decode()
        body.append(f'<p><img alt="{escape(name)}" src="data:image/png;base64,{data}"></p>')
    return _PAGE.substitute(title=title, body="\n".join([*body, *map(_section, records)]))


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """An HTML table, escaped, that scrolls on its own where it is too wide."""
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    lines = ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows]
    body = "\n".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="wide"><table><thead><tr>{top}</tr></thead><tbody>\n{body}\n</tbody></table></div>'


def _results(records: Sequence[Record]) -> str:
    metrics = list(dict.fromkeys(name for record in records for name in record.metrics))
    rows: list[list[str]] = []
    for record in records:
        last, found = record.events[-1], record.metrics
        state = last["reason"] if last["event"] == "end" else "not ended"
        tested = [f"{found[name]:.4g}" if name in found else "—" for name in metrics]
        spent = [f"{last['step']:,}", f"{record.ledger.total:,}", f"{last['samples'] / record.epoch:,.2f}"]
        rows.append([record.name, state, *tested, *spent, f"{last['time_s']:,.1f}"])
    return table(["run", "state", *(f"test {name}" for name in metrics), "steps", "SFO", "epochs", "seconds"], rows)


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
            table(_STAGE, shorten(list(stages(record)), STAGE_ROWS)),
            "<h3>Gradient evaluations (SFO)</h3>",
            table(["", "evaluations", "share"], _shares(record.ledger)),
            f"<details><summary>config.yaml</summary><pre>{escape(record.config)}</pre></details>",
        ]
    )


def _shares(ledger: Ledger) -> Iterator[list[str]]:
    for part in (*_PARTS, "total"):
        yield [part, f"{getattr(ledger, part):,}", f"{getattr(ledger, part) / ledger.total:.2%}"]


_STAGE = ("stage", "batch = world × micro × accum", "lr", "updates", "samples", "epochs", "seconds")


def stages(record: Record) -> Iterator[list[str]]:
    """A row of text for each stage, and one more for each change of its world or micro-batch on a resume."""
    begins: list[dict[str, Any]] = []
    shapes = ("stage", "batch", "world", "micro", "accum")
    for event in record.events:
        if event["event"] == "stage" and (not begins or any(event[key] != begins[-1][key] for key in shapes)):
            begins.append(event)
    rates: dict[tuple[int, int], list[float]] = {}
    for event in record.events:
        if event["event"] == "step":
            rates.setdefault((event["stage"], event["batch"]), [event["lr"]] * 2)[1] = event["lr"]
    for event, end in pairwise([*begins, record.events[-1]]):
        first, last = (f"{rate:.4g}" for rate in rates.get((event["stage"], event["batch"]), [event["lr"]] * 2))
        yield [
            f"{event['stage']:,}",
            f"{event['batch']:,} = {event['world']:,} × {event['micro']:,} × {event['accum']:,}",
            first if first == last else f"{first} – {last}",
            f"{end['step'] - event['step']:,}",
            f"{end['samples'] - event['samples']:,}",
            f"{event['samples'] / record.epoch:,.2f} – {end['samples'] / record.epoch:,.2f}",
            f"{end['time_s'] - event['time_s']:,.1f}",
        ]


def shorten(rows: list[list[str]], most: int) -> list[list[str]]:
    """The first and last rows where there are more than `most`."""
    if len(rows) <= most:
        return rows
    head, tail = rows[: most - most // 4], rows[-(most // 4) :]
    return [*head, [f"… {len(rows) - most:,} more"], *tail]
