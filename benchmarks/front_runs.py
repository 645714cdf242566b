"""Runs of the benchmark of fronts, in one process, and how they are kept: a line of results each, and its run folder.

TASK/results.jsonl has a line for every run that has ended, TASK/SCHEDULE/b16-lr0.25-s0-KEY its config.yaml and
metrics.jsonl. A run that a kill has cut off goes on from its checkpoint; checkpoints of ended runs are removed.
"""

import io
import json
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from front_tasks import FrontTask
from paired import hardware, tell
from sfo_results import key_of, whole_lines
from suite_sections import source, today

from distgrow.config.load import parse
from distgrow.config.run import Run
from distgrow.core.errors import ConfigError, TrainingFailed
from distgrow.core.lr import LR, WSD, NoDecay
from distgrow.planning.what_if.candidates import Setting
from distgrow.training.result import Result

ROOT = Path(__file__).resolve().parent.parent
AVERAGE = {"kind": "ema", "horizon": {"fraction": 0.05}}
LINES = 500  #: of updates in a run's log
DECAYS = ("constant", "linear-decay", "cosine", "wsd50", "wsd70", "wsd80")
AUTO = "auto"


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """Hold what tells one run from the others of its task."""

    schedule: str
    batch: int  #: b₀
    exponent: int  #: η₀ = 2^exponent
    seed: int

    @property
    def name(self) -> str:
        """Return the name of its folder, without the key."""
        return f"b{self.batch}-lr{2.0**self.exponent:g}-s{self.seed}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """Hold what one run came to."""

    schedule: str
    batch: int
    exponent: int
    seed: int
    key: str
    folder: str  #: of the run, seen from the results file
    updates: int
    evaluations: int
    metrics: Mapping[str, float]  #: of its end; empty if it diverged
    refused: str  #: why it could not be run, else ""
    seconds: float
    hardware: str
    made: str  #: commit and date


def schedules(task: FrontTask, batch: int, rate: float) -> dict[str, dict[str, Any]]:
    """Return the sections growth, lr and stages of all schedules at a batch and η: decays, and growth if it has room.

    The list is that of what-if, which does not measure; `auto` itself, which does, is added.
    """
    decay = WSD(warmup=task.warmup, decay=0.0) if task.warmup else NoDecay()
    lr = LR.model_validate({"base": rate, "decay": decay.model_dump()})
    cap = task.cap_of(batch) if batch in task.starts else batch
    setting = Setting(start=batch, cap=cap, lr=lr, samples=task.samples, epoch=task.epoch)
    found = setting.all() if batch in task.batches else {k: v for k, v in setting.all().items() if k not in DECAYS}
    if cap > batch:
        found[AUTO] = {"growth": {"kind": "auto", "cap": cap}, "lr": found["constant"]["lr"] if task.warmup else {}}
    return {name: values for name, values in found.items() if not task.only or name in task.only}


def config(task: FrontTask, wanted: Wanted) -> dict[str, Any]:
    """Return the config of a run, but for its folder."""
    rate = 2.0**wanted.exponent
    values = schedules(task, wanted.batch, rate)[wanted.schedule]
    return {
        **task.base,
        "growth": {"start": wanted.batch, **values["growth"]},
        "lr": {"base": rate, **values.get("lr", {})},
        "stages": values.get("stages", {}),
        "average": AVERAGE,
        "budget": {"samples": task.samples},
        "run": {
            "seed": wanted.seed,
            "log_every": max(1, task.samples // wanted.batch // LINES),
            "eval": {"every_samples": max(1, task.samples // task.evaluations), "rows": task.rows},
            "checkpoint": {"every_s": 300.0, "keep": 1},
        },
    }


class Runs:
    """Make runs of a task, or find them among those that have been made."""

    def __init__(self, task: FrontTask, folder: Path) -> None:
        self.task, self.folder, self.made = task, folder / task.name, 0
        self._file = self.folder / "results.jsonl"
        kept = [Outcome(**line) for line in map(json.loads, whole_lines(self._file))]
        self._kept = {outcome.key: outcome for outcome in kept if not outcome.refused}
        self._used: dict[str, Outcome] = {}
        self._from = f"{source(ROOT)} · {today()}"

    @property
    def used(self) -> Sequence[Outcome]:
        """Return all runs that have been asked for so far, without refused ones."""
        return [outcome for outcome in self._used.values() if not outcome.refused]

    def get(self, wanted: Wanted) -> Outcome:
        """Return what a run came to. It is made if it has not been."""
        values = config(self.task, wanted)
        key = key_of(self.task.name, values)
        if key not in self._kept:
            self._keep(self._run(wanted, values, key))
        self._used[key] = self._kept[key]
        return self._kept[key]

    def _keep(self, outcome: Outcome) -> None:
        self._kept[outcome.key] = outcome
        if not outcome.refused:  # what refuses a run, such as data that is not there, may be mended by the next call
            self.made += 1
            with self._file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(outcome), ensure_ascii=False) + "\n")
        end = (
            outcome.refused or ", ".join(f"{name} {value:.5g}" for name, value in outcome.metrics.items()) or "diverged"
        )
        name = f"{outcome.schedule} b={outcome.batch} η=2^{outcome.exponent} seed {outcome.seed}"
        tell(f"{self.task.name}: {name}: {outcome.updates:,} updates, {end}, {outcome.seconds:.1f} s")

    def _run(self, wanted: Wanted, values: dict[str, Any], key: str) -> Outcome:
        place = Path(wanted.schedule) / f"{wanted.name}-{key[:8]}"
        began, result, refused = time.monotonic(), None, ""
        try:
            result = trained({**values, "run": {**values["run"], "dir": str(self.folder / place)}})
        except ConfigError as error:
            refused = f"refused: {str(error).splitlines()[0]}"
        except TrainingFailed:
            pass
        shutil.rmtree(self.folder / place / "checkpoints", ignore_errors=True)
        updates, evaluations = spent(self.folder / place / "metrics.jsonl")
        return Outcome(
            **asdict(wanted),
            key=key,
            folder=str(place),
            updates=result.progress.step if result else updates,
            evaluations=result.progress.ledger.total if result else evaluations,
            metrics=result.metrics if result and all(map(_finite, result.metrics.values())) else {},
            refused=refused,
            seconds=time.monotonic() - began,
            hardware=hardware(),
            made=self._from,
        )


def trained(values: dict[str, Any]) -> Result:
    """Train, or go on with a run that was cut off.

    Raises:
        KeyboardInterrupt: SIGTERM or SIGINT, which fit() answers by ending early: this is no result.
    """
    run = parse(values)
    with redirect_stderr(io.StringIO()):
        if (result := resumed(run)) is None:
            shutil.rmtree(run.run.dir, ignore_errors=True)
            result = run.fit(resume=False)
    if not result.finished:
        raise KeyboardInterrupt
    return result


def resumed(run: Run) -> Result | None:
    """Go on with a run that has checkpoints. Return None if it has none that can be used, or has already ended."""
    if not any((Path(run.run.dir) / "checkpoints").glob("*")):
        return None
    try:
        result = run.fit(resume=True)
    except ConfigError:
        return None
    return result if result.metrics or not result.finished else None


def spent(path: Path) -> tuple[int, int]:
    """Return the updates and gradient evaluations of the last whole line of a run's log; 0 if there is none."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    ends = [json.loads(line) for line in lines[-2:] if line.endswith("\n")]
    return (ends[-1]["step"], ends[-1]["sfo"]) if ends else (0, 0)


def _finite(value: float) -> bool:
    return abs(value) < float("inf")
