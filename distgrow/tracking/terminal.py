"""The console: a bar of the run's progress on a terminal, plain lines elsewhere, and its events as lines."""

import sys
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column

from distgrow.core.counted import counted
from distgrow.tracking.base_event import Line
from distgrow.tracking.branch_events import BranchTest
from distgrow.tracking.events import RESERVED, End, Evaluation, OutOfMemory, Resize, Resume, Skip, Stage, Start, Step
from distgrow.tracking.pace import SmoothedRate, duration

#: Seconds between two looks at the newest update, and between two plain lines.
LIVE_S, PLAIN_S = 0.1, 10.0
#: Columns of a terminal below which units are short.
NARROW = 76


class Terminal:
    """Show one live line on a terminal; elsewhere a plain line for each stage, evaluation and ten seconds.

    Args:
        budget: samples that the run applies.
        updates: updates that this takes, if that is known beforehand.
        stream: where to write; default: stderr.
    """

    waits = True

    def __init__(self, budget: float, updates: int | None = None, stream: Any = None) -> None:
        self._console = Console(file=stream or sys.stderr, highlight=False, markup=False, soft_wrap=True)
        self._budget, self._updates = budget, updates
        self._rate = SmoothedRate()
        self._bar = _bar(self._console) if self._console.is_terminal else None
        self._task = self._bar.add_task("", total=None, start=False, now="", doing="") if self._bar else None
        self._look_at = self._print_at = 0.0
        self._unshown: Line | None = None  #: the newest update, until something of it stays on the screen

    def log(self, event: Line) -> None:
        """Show the event if it is one for people."""
        kind = event["event"]
        if kind == Step.kind:
            self._step(event)
        elif kind == Evaluation.kind:
            self._console.print(_evaluation(event))
        elif kind in _SHOWN:
            for damage in event.get("damaged") or ():
                self._console.print(f"damaged and not used: {damage}")
            if kind == End.kind:
                self._stop()
            words = {"place": _place(event, 2), "why": _why(event), "counted": _counted(event)}
            line = _SHOWN[kind].format_map({**event, **words})
            self._console.print(line + _followed(event))
            for further in (*(event.get("groups") or ()), *(event.get("init") or ())):
                self._console.print(further)

    def close(self) -> None:
        """Remove the bar; leave the last update of a run that did not end as a line."""
        newest = self._unshown
        self._stop()
        if newest is not None:
            self._console.print(self._plain(newest))

    def _stop(self) -> None:
        self._unshown = None
        if self._bar is not None:
            self._bar.stop()

    def _step(self, event: Line) -> None:
        now, self._unshown = time.monotonic(), event
        if now < self._look_at:
            return
        self._look_at = now + LIVE_S
        self._rate.add(event["sfo_applied"], event["time_s"])
        if self._bar is not None and self._task is not None:
            self._bar.start()
            done = event["sfo_applied"]
            self._bar.update(
                self._task, total=self._budget, completed=done, now=self._now(event), doing=f"· {doing_of(event)}"
            )
        elif now >= self._print_at:
            self._print_at, self._unshown = now + PLAIN_S, None
            self._console.print(self._plain(event))

    def _plain(self, event: Line) -> str:
        return f"{self._now(event)} · {doing_of(event)}"

    def _now(self, event: Line) -> str:
        rate = self._rate.samples_per_s() or event["samples_per_s"]
        short = self._bar is not None and self._console.width < NARROW
        unit = "/s" if short else " samples/s"
        if event.get("tokens_per_s"):
            tokens = f"{rate * event['tokens_per_s'] / event['samples_per_s']:,.0f}"
            unit += f" · {tokens} tokens/s"
        if event.get("mfu"):
            unit += f" · MFU {rate * event['mfu'] / event['samples_per_s']:.1%}"
        return standing_of(event, self._budget, self._updates, rate, unit=unit)


def _bar(console: Console) -> Progress:
    """Return a line that keeps what is left of the run in sight: its end is cut off on a narrow terminal."""
    whole, rest = Column(no_wrap=True), Column(no_wrap=True, overflow="ellipsis", ratio=1)
    return Progress(
        BarColumn(bar_width=10 if console.width < 100 else 20),
        TextColumn("{task.fields[now]}", table_column=whole, markup=False),
        TextColumn("{task.fields[doing]}", table_column=rest, markup=False),
        console=console,
        transient=True,
        expand=True,
        refresh_per_second=8,
    )


_SHOWN = {
    Start.kind: "run {dir}: world {world}, {counted[budget_samples]} to go",
    Resume.kind: "resumed from {checkpoint} at step {step}",
    Resize.kind: "resized from {old} to {counted[new]} ({wanted} wanted) in {seconds:.1f} s",
    Stage.kind: "stage {stage}: batch {batch} = {world} × {micro} × {accum}, lr {lr:.4g}, from {place}",
    BranchTest.kind: "branches with batches {batches} from step {step}: {batch} goes on",
    OutOfMemory.kind: "step {step}: out of memory with micro-batches of {counted[micro]}; the batch is split anew",
    Skip.kind: "step {step}: {why}; {counted[batch]} skipped",
    End.kind: "{reason}: {counted[step]}, {counted[sfo]}, {time_s:.1f} s",
}
_NOUNS = {
    "step": "update",
    "sfo": "gradient evaluation",
    "batch": "sample",
    "budget_samples": "sample",
    "new": "worker",
    "micro": "row",
}


def _counted(event: Line) -> dict[str, str]:
    """Return the event's counts with their nouns."""
    return {key: counted(event[key], noun) for key, noun in _NOUNS.items() if event.get(key) is not None}


def _followed(event: Line) -> str:
    """Return the optimizer's settings that follow the batch, for the line of a stage."""
    return "".join(f", {name} {event[name]:.4g}" for name in ("momentum", "beta2", "weight_decay") if name in event)


def standing_of(event: Line, budget: float, updates: int | None, per_s: float | None, unit: str = " samples/s") -> str:
    """Return share of the budget, steps, rate and time left, e.g. "38 % · 412/1,080 · 90 samples/s · 3 s left"."""
    share = int(100 * min(1.0, event["sfo_applied"] / budget)) if budget else 100
    steps = f"{event['step']:,}" if updates is None else f"{event['step']:,}/{updates:,}"
    left = f"{duration(max(0.0, budget - event['sfo_applied']) / per_s)} left" if per_s else "unknown time left"
    return f"{share} % · {steps} · {per_s or 0:,.0f}{unit} · {left}"


def doing_of(event: Line) -> str:
    """Return batch, loss, learning rate and stage of a step event; what matters most stands first."""
    unknown = "not known yet" if event["grad_norm"] is None else "not finite"  # asynchronous workers have only begun
    loss = unknown if event["loss"] is None else f"{event['loss']:.4f}"
    return f"loss {loss} · batch {event['batch']:,} · lr {event['lr']:.3g} · stage {event['stage']}"


def _evaluation(event: Line) -> str:
    own = {key: value for key, value in event.items() if key not in RESERVED}
    metrics = ", ".join(f"{key} {'not finite' if value is None else f'{value:.4f}'}" for key, value in own.items())
    return f"{_place(event, 1)}: {metrics}"


def _place(event: Line, digits: int) -> str:
    """Return where an event is: its epoch or, in a stream that has none, its samples."""
    epoch, samples = event.get("epoch", 0.0), event.get("samples", 0)
    return counted(samples, "sample") if samples and epoch < 1e-9 else f"epoch {epoch:.{digits}f}"


def _why(event: Line) -> str:
    """Return why an update was skipped."""
    if event.get("late"):
        return f"a gradient came {counted(event['delay'], 'update')} late and was dropped"
    return "the batch counted no items" if event.get("empty") else "the gradient was not finite"
