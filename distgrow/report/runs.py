"""What run folders hold, read and checked: a Record of each run; knows nothing of plots and pages."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distgrow.progress import Ledger
from distgrow.run import RunFolder
from distgrow.spec import ConfigError
from distgrow.track import history, read_events

Events = Sequence[dict[str, Any]]

PARTS = ("applied", "skipped", "replayed", "discarded", "probe")
_PLACES = ("event", "step", "samples", "time_s")
_NEEDED = {
    "step": ("sfo", "epoch", "stage", "batch", "lr", "loss", "grad_norm"),
    "stage": ("epoch", "stage", "batch", "world", "micro", "accum", "lr"),
    "end": ("reason",),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One run: its config as written, its events as if it had never crashed, each with the SFO total at its time."""

    name: str
    config: str
    events: Events
    ledger: Ledger

    @property
    def metrics(self) -> dict[str, float]:
        """The last evaluation of the test set, its loss first; empty before one."""
        last = next((event for event in reversed(self.events) if event["event"] == "eval"), {})
        own = [key for key, value in last.items() if isinstance(value, int | float)]
        own = [key for key in own if key not in (*_PLACES, "epoch", "sfo")]
        return {key: last[key] for key in sorted(own, key=lambda key: key != "loss")}

    @property
    def epoch(self) -> float:
        """Samples of one pass over the training set."""
        last = next(event for event in reversed(self.events) if event["event"] == "step")
        return last["samples"] / last["epoch"]


def metrics(records: Iterable[Record]) -> list[str]:
    """Names of all the runs' metrics of the test set."""
    return list(dict.fromkeys(name for record in records for name in record.metrics))


def read(runs: Iterable[str]) -> list[Record]:
    """The runs, each folder once, in the order given. ConfigError names a folder or line that is not as it must be."""
    folders = {Path(run).resolve(): RunFolder(run) for run in runs}
    return [_read(folder, name) for folder, name in zip(folders.values(), _names(list(folders)), strict=True)]


def _names(paths: Sequence[Path]) -> list[str]:
    """The last part of each path, or as many parts as tell them all apart."""
    depth, names = 1, [path.name for path in paths]
    while len(set(names)) < len(names):
        depth += 1
        names = [str(Path(*path.parts[-depth:])) for path in paths]
    return names


def _read(folder: RunFolder, name: str) -> Record:
    try:
        for file in (folder.config, folder.metrics):
            if not file.is_file():
                raise ConfigError(f"{file} does not exist; name the run.dir of a run that has begun")
        config, recorded = folder.config.read_text(encoding="utf-8"), read_events(folder.metrics)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{folder.path} cannot be read: {error}; repair its config.yaml or metrics.jsonl") from error
    for event in recorded:
        if not isinstance(event, dict) or any(key not in event for key in _PLACES):
            raise _damaged(folder.metrics, json.dumps(event), f"lacks one of {', '.join(_PLACES)}")
        missing = [key for key in _NEEDED.get(event["event"], ()) if key not in event]
        if missing:
            raise _damaged(folder.metrics, json.dumps(event), f"lacks {', '.join(missing)}")
    events, ledger = _counted(history(recorded))
    if not any(event["event"] == "step" for event in events):
        raise ConfigError(f"{folder.metrics} holds no update yet; wait for the run, or lower its run.log_every")
    return Record(name=name, config=config, events=events, ledger=ledger)


def _damaged(path: Path, line: str, fault: str) -> ConfigError:
    shown = line if len(line) <= 80 else line[:80] + " …"
    return ConfigError(f"{path} is damaged: the line {shown!r} {fault}; repair or remove that line")


def _counted(events: Events) -> tuple[Events, Ledger]:
    """The events with `sfo` where a line lacks it, and the ledger at their end.

    Not every update has a line (run.log_every), but every line has `samples`, and these are applied or skipped.
    """
    counted: list[dict[str, Any]] = []
    ledger = Ledger()
    for event in events:
        parts = {part: event.get(f"sfo_{part}", getattr(ledger, part)) for part in PARTS[1:]}
        ledger = Ledger(**parts, applied=event["samples"] - parts["skipped"])
        counted.append({"sfo": ledger.total, **event})
    return counted, ledger
