"""Trackers: metrics.jsonl always, the console, TensorBoard when it is installed; they see, they never decide."""

import json
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.live import Live
from rich.text import Text

from distgrow.core.plan import Plan
from distgrow.core.progress import Outcome, Progress, finite
from distgrow.run.folder import RunError, RunFolder, storing

Event = Mapping[str, Any]


class Tracker(Protocol):
    """A place where events go: each is a flat mapping with `event`, `step`, `samples`, `time_s` and its own keys."""

    def log(self, event: Event) -> None: ...

    def close(self) -> None: ...


class NullTracker:
    """Nothing is kept: for all ranks but the first."""

    def log(self, event: Event) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


class Trackers:
    """Several trackers as one."""

    def __init__(self, trackers: Iterable[Tracker]) -> None:
        self._trackers = list(trackers)

    def log(self, event: Event) -> None:
        """Log to all."""
        for tracker in self._trackers:
            tracker.log(event)

    def close(self) -> None:
        """Close all."""
        for tracker in self._trackers:
            tracker.close()


_JSON = json.JSONEncoder(allow_nan=False, check_circular=False)


class JSONL:
    """One JSON object a line; a step line waits at most a tenth of a second for the next, all others are on disk.

    Lines are cheap to write together and dear to write one by one, between updates of a few hundred microseconds.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._waiting = path, list[Event]()
        self._due = 0.0
        with storing(path):
            _drop_torn_line(path)
            self._file = path.open("a", encoding="utf-8")

    def log(self, event: Event) -> None:
        """Append the event."""
        self._waiting.append(event)
        if time.monotonic() >= self._due or event["event"] != "step":
            self._write()

    def close(self) -> None:
        """Close the file."""
        self._write()
        with storing(self._path):
            self._file.close()

    def _write(self) -> None:
        with storing(self._path):
            self._file.write("".join(_JSON.encode(event) + "\n" for event in self._waiting))
            self._file.flush()
        self._waiting.clear()
        self._due = time.monotonic() + 0.1


def _drop_torn_line(path: Path) -> None:
    """Cut off a last line that a crash left without its end."""
    if not path.exists():
        return
    with path.open("rb+") as file:
        size = file.seek(0, 2)
        tail_start = max(0, size - (1 << 20))
        file.seek(tail_start)
        tail = file.read()
        if tail and not tail.endswith(b"\n"):
            file.truncate(tail_start + tail.rfind(b"\n") + 1)


def read_events(path: Path) -> list[dict[str, Any]]:
    """All whole lines of a metrics.jsonl; none where there is no such file. RunError where a line is damaged."""
    if not path.exists():
        return []
    with storing(path), path.open(encoding="utf-8", errors="replace") as file:
        return [read_line(line.strip(), path) for line in file if line.endswith("\n")]


def read_line(line: str, path: Path) -> dict[str, Any]:
    """One line of a metrics.jsonl. RunError where it is damaged."""
    fault = "is not JSON"
    try:
        event = json.loads(line)
        if isinstance(event, dict) and "event" in event:
            return event
        fault = "lacks one of event, step, samples, time_s"
    except (ValueError, RecursionError):
        pass
    shown = line if len(line) <= 80 else line[:80] + " …"
    raise RunError(f"{path} is damaged: the line {shown!r} {fault}; repair or remove that line")


def history(events: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The events of the run as if it had never crashed: what a resume went back over is left out."""
    kept: list[dict[str, Any]] = []
    for event in events:
        if event["event"] == "resume":
            kept = [old for old in kept if old["samples"] <= event["samples"]]
        kept.append(event)
    return kept


def last_total(events: Iterable[Event]) -> int:
    """The largest SFO total that was logged: how far a crashed run had come."""
    return max((event.get("sfo", 0) for event in events), default=0)


class Terminal:
    """One live line on a terminal; elsewhere a plain line per stage, evaluation and ten seconds."""

    def __init__(self, budget: float, stream: Any = None) -> None:
        self._console = Console(file=stream or sys.stderr, highlight=False, markup=False, soft_wrap=True)
        self._budget = budget
        self._live = Live(console=self._console, refresh_per_second=8) if self._console.is_terminal else None
        self._next = 0.0
        self._newest: Event | None = None
        if self._live is not None:
            self._live.start()

    def log(self, event: Event) -> None:
        """Show the event if it is one for people."""
        kind = event["event"]
        if kind == "step":
            self._step(event)
        elif kind == "eval":
            self._console.print(_evaluation(event))
        elif kind in _SHOWN:
            for damage in event.get("damaged", ()):
                self._console.print(f"damaged and not used: {damage}")
            self._console.print(_SHOWN[kind].format_map(event))

    def close(self) -> None:
        """Leave the last update's line standing."""
        if self._live is not None:
            if self._newest is not None:
                self._live.update(self._line(self._newest))
            self._live.stop()

    def _step(self, event: Event) -> None:
        self._newest, now = event, time.monotonic()
        if now < self._next:
            return
        self._next = now + (0.1 if self._live is not None else 10.0)
        if self._live is not None:
            self._live.update(self._line(event))
        else:
            self._console.print(self._line(event))

    def _line(self, event: Event) -> Text:
        return Text(step_line(event, self._budget), no_wrap=self._live is not None, overflow="ellipsis")


_SHOWN = {
    "start": "run {dir}: world {world}, {budget_samples:,} samples to go",
    "resume": "resumed from {checkpoint} at step {step}",
    "resize": "resized from {old} to {new} workers ({wanted} wanted) in {seconds:.1f} s",
    "stage": "stage {stage}: batch {batch} = {world} × {micro} × {accum}, lr {lr:.4g}, from epoch {epoch:.2f}",
    "oom": "step {step}: out of memory with micro-batches of {micro} rows; the same batch again in smaller ones",
    "skip": "step {step}: the gradient was not finite; {batch} samples skipped",
    "end": "{reason}: {step:,} updates, {sfo:,} gradient evaluations, {time_s:.1f} s",
}


def step_line(event: Event, budget: float) -> str:
    """stage, batch = world × micro × accum, LR, loss, SFO, samples/s and time left of a step event."""
    loss = "not finite" if event["loss"] is None else f"{event['loss']:.4f}"
    rate = event["samples_per_s"]
    seconds = min(max(0.0, budget - event["sfo_applied"]) / rate, 1e12) if rate else None
    left = "unknown time" if seconds is None else timedelta(seconds=round(seconds))
    return (
        f"stage {event['stage']} · batch {event['batch']} = {event['world']} × {event['micro']} × {event['accum']} "
        f"· lr {event['lr']:.4g} · loss {loss} · sfo {event['sfo']:,} · {rate:,.0f} samples/s · {left} left"
    )


def _evaluation(event: Event) -> str:
    own = {key: value for key, value in event.items() if key not in RESERVED}
    figures = ", ".join(f"{key} {'not finite' if value is None else f'{value:.4f}'}" for key, value in own.items())
    return f"epoch {event['epoch']:.1f}: {figures}"


#: Keys of an evaluation's event that are not its metrics.
RESERVED = frozenset({"event", "step", "samples", "epoch", "sfo", "time_s"})
_PLACES = ("step", "samples", "sfo", "time_s")


class TensorBoard:
    """Scalars of evaluations and probes, and of steps ten times a second, against SFO."""

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder))
        self._next = 0.0

    def log(self, event: Event) -> None:
        """Write the event's numbers."""
        kind, now = event["event"], time.monotonic()
        if kind == "step" and now < self._next:
            return
        if kind in ("step", "eval", "probe"):
            self._next = now + 0.1
            for key, value in event.items():
                if isinstance(value, int | float) and key not in _PLACES:
                    self._writer.add_scalar(f"{kind}/{key}", value, event["sfo"])

    def close(self) -> None:
        """Close the files."""
        self._writer.close()


def tensorboard(folder: Path) -> Tracker:
    """A TensorBoard tracker where the package is installed."""
    try:
        return TensorBoard(folder)
    except ImportError:
        return NullTracker()


@contextmanager
def tracking(folder: RunFolder, rank: int, samples: int, others: Iterable[Tracker] = ()) -> Iterator[Tracker]:
    """All trackers and `others` on the first rank, none elsewhere, for a run of `samples` samples."""
    ours = [JSONL(folder.metrics), Terminal(samples), tensorboard(folder.tensorboard)] if rank == 0 else []
    tracker = Trackers([*ours, *others] if rank == 0 else [])
    try:
        yield tracker
    finally:
        tracker.close()


def step_event(
    progress: Progress, plan: Plan, outcome: Outcome, *, epoch: int, time_s: float, samples_per_s: float
) -> dict[str, Any]:
    """A `step` line of metrics.jsonl, as it stands after the update."""
    ledger = progress.ledger
    return {
        "event": "step" if outcome.applied else "skip",
        "step": progress.step,
        "samples": progress.samples,
        "epoch": progress.samples / epoch,
        "stage": plan.stage,
        "batch": plan.batch,
        "micro": plan.micro,
        "accum": plan.accum,
        "world": plan.world,
        "lr": plan.lr,
        "loss": finite(outcome.loss),
        "grad_norm": finite(outcome.grad_norm),
        "grad_sq": finite(progress.noise.grad_sq.value),
        "noise_trace": finite(progress.noise.variance.value),
        "noise_scale": finite(progress.noise.scale),
        "sfo": ledger.total,
        "sfo_applied": ledger.applied,
        "sfo_skipped": ledger.skipped,
        "sfo_replayed": ledger.replayed,
        "sfo_discarded": ledger.discarded,
        "sfo_probe": ledger.probe,
        "time_s": time_s,
        "samples_per_s": samples_per_s,
    }
