"""SessionRecord: a run under another trainer, written down as `distgrow report` reads it; knows no trainer."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distgrow.core.errors import ConfigError, RunError
from distgrow.core.plan import Plan
from distgrow.core.progress import Outcome, Progress, finite
from distgrow.distributed.world import World
from distgrow.growth.controller import Controller
from distgrow.run.folder import RunFolder
from distgrow.tracking.event_log import EventLog
from distgrow.tracking.events import RESERVED, End, Evaluation, Resume, Stage, Start
from distgrow.tracking.jsonl import JSONL
from distgrow.tracking.read import read_events
from distgrow.tracking.update_event import shape_of


class NoRecord:
    """Record nothing: on other ranks than the first, or if nobody has asked."""

    def __init__(self, *, wanted: bool = False) -> None:
        self.wanted = wanted  #: the first rank records, so every rank has to take part in the mean of the loss

    def begin(self, progress: Progress, plan: Plan) -> None:
        """Do nothing."""

    def end(self, progress: Progress, plan: Plan, outcome: Outcome) -> None:
        """Do nothing."""

    def evaluated(self, progress: Progress, metrics: Mapping[str, Any]) -> None:
        """Do nothing."""

    def close(self, progress: Progress, *, done: bool) -> None:
        """Do nothing."""


class SessionRecord(NoRecord):
    """Write config.yaml and metrics.jsonl of one run, on the first rank. The checkpoints are the trainer's own."""

    def __init__(self, folder: str | Path, controller: Controller) -> None:
        """Name the folder, which is made when the run begins."""
        super().__init__(wanted=True)
        self._folder, self._controller = RunFolder(folder), controller
        self._events: EventLog | None = None
        self._stage, self._began = -1, 0.0

    def begin(self, progress: Progress, plan: Plan) -> None:
        """Record that an update begins: the run's first, or that of a new stage, has a line of its own."""
        events = self._events or self._open(progress)
        self._began = time.monotonic()
        if plan.stage != self._stage:
            self._stage = plan.stage
            epoch = progress.samples / self._controller.epoch
            events.log(Stage(**events.place(progress), epoch=epoch, stage=plan.stage, lr=plan.lr, **shape_of(plan)))

    def end(self, progress: Progress, plan: Plan, outcome: Outcome) -> None:
        """Record an update that is made."""
        assert self._events is not None
        seconds, epoch = time.monotonic() - self._began, self._controller.epoch
        rate = plan.batch / seconds if seconds > 0 else 0.0
        self._events.update(progress, plan, outcome, epoch=epoch, samples_per_s=rate)

    def evaluated(self, progress: Progress, metrics: Mapping[str, Any]) -> None:
        """Record the numbers among the metrics of an evaluation."""
        if self._events is None:
            return  # before the first update: a trainer's check of its validation loop
        numbers = {name: finite(float(value)) for name, value in metrics.items() if _is_number(value)}
        more = {name: value for name, value in numbers.items() if name not in RESERVED}
        epoch = progress.samples / self._controller.epoch
        self._events.log(Evaluation(**self._events.place(progress), epoch=epoch, more=more))
        self._events.flush()

    def close(self, progress: Progress, *, done: bool) -> None:
        """Record why the run ends, and close the files."""
        if self._events is None:
            return
        self._events.log(End(**self._events.place(progress), reason="done" if done else "stopped by the trainer"))
        self._events.flush()
        self._events.tracker.close()
        self._events, self._stage = None, -1

    def _open(self, progress: Progress) -> EventLog:
        """Make the folder, or go on in it if the trainer goes on from a checkpoint of its own."""
        settings, folder = self._settings(), self._folder
        try:
            if goes_on := progress.samples > 0 and folder.begun():
                folder.reopen(settings)
            else:
                folder.create(settings)
        except RunError as error:
            raise ConfigError(f"record={str(folder.path)!r}: {error}; give record another folder") from None
        seconds = max((event.time_s for event in read_events(folder.metrics)), default=0.0)
        events = self._events = EventLog(JSONL(folder.metrics))
        events.began -= seconds
        place = events.place(progress)
        if goes_on:
            events.log(Resume(**place, sfo_replayed=progress.ledger.replayed))
        else:
            samples, world = self._controller.samples(), self._controller.world
            events.log(Start(**place, dir=str(folder.path), world=world, budget_samples=samples))
        return events

    def _settings(self) -> dict[str, Any]:
        controller = self._controller
        specs = {name: getattr(controller, name) for name in ("growth", "stages", "lr", "budget")}
        shown = {name: spec.model_dump(mode="json") for name, spec in specs.items()}
        return {**shown, "engine": {"max_micro": controller.max_micro}}


def recorder(folder: str | Path | None, controller: Controller, world: World) -> NoRecord:
    """Return the record of a run, which the first rank writes into `folder`; None: nothing is written."""
    if folder is None or world.rank > 0:
        return NoRecord(wanted=folder is not None)
    return SessionRecord(folder, controller)


def _is_number(value: Any) -> bool:
    try:
        float(value)
    except (TypeError, ValueError, RuntimeError):
        return False
    return not isinstance(value, str)
