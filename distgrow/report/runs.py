"""What run folders hold, read and checked: a Record of each run; knows nothing of plots and pages."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from distgrow.core.errors import ConfigError
from distgrow.core.progress import Ledger
from distgrow.report.log import PLACES, Array, Event, Events, Log
from distgrow.run.folder import RunFolder


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One run as if it had never crashed, with at least one update."""

    name: str
    config: str  #: as written
    steps: Mapping[str, Array]  #: the columns of its step lines, NaN for null
    events: Events  #: its other lines, each with the SFO total at its time
    ledger: Ledger
    last: Event  #: its last line

    @property
    def metrics(self) -> dict[str, float]:
        """The last evaluation of the test set, its loss first; empty before one."""
        last = next((event for event in reversed(self.events) if event["event"] == "eval"), {})
        own = [key for key, value in last.items() if isinstance(value, int | float)]
        own = [key for key in own if key not in (*PLACES, "epoch", "sfo")]
        return {key: last[key] for key in sorted(own, key=lambda key: key != "loss")}

    @property
    def epoch(self) -> float:
        """Samples of one pass over the training set."""
        return float(self.steps["samples"][-1] / self.steps["epoch"][-1])

    @property
    def first_batch(self) -> int:
        """Samples of the first update."""
        first = next((event["batch"] for event in self.events if event["event"] == "stage"), None)
        return int(self.steps["batch"][0] if first is None else first)

    @property
    def updates(self) -> int:
        """Applied updates so far."""
        return int(self.last["step"])

    @property
    def state(self) -> str:
        """How the run ended, or that it has not."""
        return str(self.last["reason"]) if self.last["event"] == "end" else "not ended"

    def of(self, kind: str) -> Events:
        """Its lines of a kind other than step."""
        return [event for event in self.events if event["event"] == kind]

    def seconds(self) -> Array:
        """Seconds of the update that each step line tells of; NaN where it does not."""
        rate = self.steps["samples_per_s"]
        return self.steps["batch"] / np.where(rate > 0, rate, np.nan)


def metrics(records: Iterable[Record]) -> list[str]:
    """Names of all the runs' metrics of the test set."""
    return list(dict.fromkeys(name for record in records for name in record.metrics))


def read(runs: Iterable[str]) -> list[Record]:
    """The runs, each folder once, in the order given. ConfigError names a folder or line that is not as it must be."""
    return [_read(name, folder) for name, folder in named(runs).items()]


def named(runs: Iterable[str]) -> dict[str, RunFolder]:
    """The folders, each once, by the last part of its path, or by as many parts as tell them all apart."""
    folders = {Path(run).resolve(): RunFolder(run) for run in runs}
    return dict(zip(_names(list(folders)), folders.values(), strict=True))


def _names(paths: Sequence[Path]) -> list[str]:
    depth, names = 1, [path.name for path in paths]
    while len(set(names)) < len(names):
        depth += 1
        names = [str(Path(*path.parts[-depth:])) for path in paths]
    return names


def _read(name: str, folder: RunFolder) -> Record:
    for file in (folder.config, folder.metrics):
        if not file.is_file():
            raise ConfigError(f"{file} does not exist; name the run.dir of a run that has begun")
    log = Log(folder.metrics)
    found = newest(name, folder, log)
    if found is None:
        raise ConfigError(f"{folder.metrics} holds no update yet; wait for the run, or lower its run.log_every")
    return found


def newest(name: str, folder: RunFolder, log: Log) -> Record | None:
    """The run as it stands now, read on from where `log` has come to; None before its first step line."""
    try:
        log.advance()
        config = folder.config.read_text(encoding="utf-8") if folder.config.is_file() else ""
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{folder.path} cannot be read: {error}; repair its config.yaml or metrics.jsonl") from error
    if not len(log):
        return None
    steps, events, ledger, last = log.steps(), log.events(), log.ledger(), log.last()
    return Record(name=name, config=config, steps=steps, events=events, ledger=ledger, last=last)
