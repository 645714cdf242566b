"""What run folders hold, read and checked: a Record of each run; knows nothing of plots and pages."""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from distgrow.core.errors import ConfigError
from distgrow.core.progress import Ledger
from distgrow.report.log import Array, Log
from distgrow.run.folder import RunFolder
from distgrow.tracking.base_event import Event
from distgrow.tracking.events import End, Evaluation, Stage, Start

E = TypeVar("E", bound=Event)


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """Hold one run as if it had never crashed, with at least one update."""

    name: str
    config: str  #: as written
    steps: Mapping[str, Array]  #: the columns of its step lines, NaN for null
    events: Sequence[Event]  #: its other lines, each with the SFO total at its time
    ledger: Ledger
    last: Event  #: its last line
    sample: str | None = None  #: what the model has made last, such as a text

    @property
    def metrics(self) -> dict[str, float]:
        """The last evaluation of the test set, its loss first; empty before one."""
        evaluations = self.of(Evaluation)
        metrics = evaluations[-1].metrics if evaluations else {}
        return {name: metrics[name] for name in sorted(metrics, key=lambda name: name != "loss")}

    @property
    def epoch(self) -> float:
        """Samples of one pass over the training set."""
        return float(self.steps["samples"][-1] / self.steps["epoch"][-1])

    @property
    def first_batch(self) -> int:
        """Samples of the first update."""
        stages = self.of(Stage)
        return stages[0].batch if stages else int(self.steps["batch"][0])

    @property
    def updates(self) -> int:
        """Applied updates so far."""
        return max(self.last.step, int(self.steps["step"].max()))

    @property
    def state(self) -> str:
        """How the run ended, or that it has not."""
        return self.last.reason if isinstance(self.last, End) else "not ended"

    @property
    def ended(self) -> bool:
        """Return whether the run has ended."""
        return isinstance(self.last, End)

    @property
    def budget(self) -> float | None:
        """Samples that the run may apply in all; None if its lines do not say."""
        starts = self.of(Start)
        return starts[-1].budget_samples if starts else None

    def of(self, *kinds: type[E]) -> list[E]:
        """Return the lines of these kinds other than step, in the order of the run."""
        return [event for event in self.events if isinstance(event, kinds)]

    def seconds(self) -> Array:
        """Return the seconds of the update of each step line, NaN if the line does not say."""
        rate = self.steps["samples_per_s"]
        return self.steps["batch"] / np.where(rate > 0, rate, np.nan)


def metrics(records: Iterable[Record]) -> list[str]:
    """Return the names of all the runs' metrics of the test set."""
    return list(dict.fromkeys(name for record in records for name in record.metrics))


def read(runs: Iterable[str]) -> list[Record]:
    """Return the runs, each folder once, in the order given.

    Raises:
        ConfigError: a folder or a line is not as it must be.
    """
    return [_read(name, folder) for name, folder in named(runs).items()]


def named(runs: Iterable[str]) -> dict[str, RunFolder]:
    """Return the folders, each once, by the last part of its path, or by as many parts as tell them all apart."""
    folders = {Path(os.path.realpath(run)): RunFolder(run) for run in runs}  # resolve() raises on a loop of links
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
    record = newest(name, folder, log)
    if record is None:
        raise ConfigError(f"{folder.metrics} holds no update yet; wait for the run, or lower its run.log_every")
    return record


def newest(name: str, folder: RunFolder, log: Log) -> Record | None:
    """Return the run as it stands now, or None before its first step line; `log` goes on where it has come to.

    Raises:
        ConfigError: its files cannot be read, or a line is damaged.
    """
    try:
        log.advance()
        config = folder.config.read_text(encoding="utf-8") if folder.config.is_file() else ""
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{folder.path} cannot be read: {error}; repair its config.yaml or metrics.jsonl") from error
    last = log.last()
    if not len(log) or last is None:
        return None
    parts: dict[str, Any] = {"steps": log.steps(), "events": log.events(), "ledger": log.ledger(), "last": last}
    return Record(name=name, config=config, sample=_sample(folder.samples), **parts)


def _sample(file: Path) -> str | None:
    """Return the last of the samples that a run has kept; None if there are none, or it is being written."""
    try:
        made = json.loads(file.read_text(encoding="utf-8").splitlines()[-1])["made"]
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return made if isinstance(made, str) else json.dumps(made, ensure_ascii=False, indent=1)
