"""Events of a run: one flat mapping each, how they are made and how they are read back."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from distgrow.core.errors import RunError
from distgrow.core.plan import Plan
from distgrow.core.progress import Outcome, Progress, finite
from distgrow.run.folder import storing

Event = Mapping[str, Any]


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
