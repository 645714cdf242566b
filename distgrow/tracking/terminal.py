"""The console: progress of a run, and its events as lines."""

import sys
import time
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

from distgrow.tracking.base_event import Line
from distgrow.tracking.events import RESERVED


class Terminal:
    """One live line on a terminal; elsewhere a plain line per stage, evaluation and ten seconds."""

    def __init__(self, budget: float, stream: Any = None) -> None:
        self._console = Console(file=stream or sys.stderr, highlight=False, markup=False, soft_wrap=True)
        self._budget = budget
        self._live = Live(console=self._console, refresh_per_second=8) if self._console.is_terminal else None
        self._next = 0.0
        self._newest: Line | None = None
        if self._live is not None:
            self._live.start()

    def log(self, event: Line) -> None:
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

    def _step(self, event: Line) -> None:
        self._newest, now = event, time.monotonic()
        if now < self._next:
            return
        self._next = now + (0.1 if self._live is not None else 10.0)
        if self._live is not None:
            self._live.update(self._line(event))
        else:
            self._console.print(self._line(event))

    def _line(self, event: Line) -> Text:
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


def step_line(event: Line, budget: float) -> str:
    """stage, batch = world × micro × accum, LR, loss, SFO, samples/s and time left of a step event."""
    loss = "not finite" if event["loss"] is None else f"{event['loss']:.4f}"
    rate = event["samples_per_s"]
    seconds = min(max(0.0, budget - event["sfo_applied"]) / rate, 1e12) if rate else None
    left = "unknown time" if seconds is None else timedelta(seconds=round(seconds))
    return (
        f"stage {event['stage']} · batch {event['batch']} = {event['world']} × {event['micro']} × {event['accum']} "
        f"· lr {event['lr']:.4g} · loss {loss} · sfo {event['sfo']:,} · {rate:,.0f} samples/s · {left} left"
    )


def _evaluation(event: Line) -> str:
    own = {key: value for key, value in event.items() if key not in RESERVED}
    figures = ", ".join(f"{key} {'not finite' if value is None else f'{value:.4f}'}" for key, value in own.items())
    return f"epoch {event['epoch']:.1f}: {figures}"
