"""Rate choice: measures lr.base=auto before a run has made an update, charges and records it, finds it on resume."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from distgrow.checkpoint.manager import opened
from distgrow.checkpoint.storage import Store
from distgrow.core.errors import ConfigError
from distgrow.core.progress import finite
from distgrow.data.dataset import size_of
from distgrow.distributed.world import World
from distgrow.growth.controller import Controller
from distgrow.run.folder import RunFolder
from distgrow.run.resume_mode import ResumeMode
from distgrow.run.stop import StopRequests
from distgrow.tasks.task import Task
from distgrow.tracking.jsonl import JSONL
from distgrow.tracking.rate_events import RateChoice, RateTrial
from distgrow.tracking.read import last_total, read_events
from distgrow.training.first_rate import first_rate, most_evaluations, recorded_rate, updates_of
from distgrow.training.rate_test import SCRATCH, RateResult, RateResults, constant, find_rates
from distgrow.training.settings import Settings
from distgrow.training.short_run import remove_scratch


@dataclass(frozen=True, slots=True, kw_only=True)
class RateChooser:
    """Hold what is needed to measure the rate of one run."""

    task: Task
    settings: Settings  #: with lr.base=auto
    folder: RunFolder
    store: Store
    world: World
    about: Mapping[str, Any]  #: recorded in config.yaml beside the settings
    stop: StopRequests
    check: Callable[[Controller], None]  #: checks the schedule of a new run, and what it trains; collective

    def choose(self, resume: ResumeMode) -> float:
        """Return the rate that is recorded, or measure and record it. Collective: every rank must call.

        Raises:
            ConfigError: It cannot be measured, or all rates are unstable.
            Stopped: On request. Nothing is recorded but what was tried.
        """
        folder, world = self.folder, self.world
        world.on_rank0(lambda: self.store.pull(folder, resume=resume))
        if resume is not ResumeMode.START and (known := world.on_rank0(lambda: recorded_rate(folder))) is not None:
            return known
        settings, epoch = self.settings, size_of(self.task.train)
        first, updates = first_rate(settings), updates_of(settings, epoch)
        most_evaluations(settings, epoch)
        self.check(self._ahead(first, updates, epoch))
        recorded = {**self.about, **settings.recorded()}
        with opened(folder, self.store, world, recorded, settings.specs(), resume=resume):
            world.on_rank0(lambda: remove_scratch(folder.path, SCRATCH))
            log = _Log(folder) if world.rank == 0 else None
            tell = log.tried if log else _nothing
            results = find_rates(settings, first, updates, self.task, folder, world, tell, self.stop)
            if (chosen := results.proposed) is None:
                raise ConfigError(unstable(results, settings.growth.start))
            if log:
                log.chosen(results, chosen, updates, settings.growth.start)
            lr = settings.lr.at(chosen).model_dump(mode="json")
            world.on_rank0(lambda: folder.record_section("lr", lr))
        return chosen

    def _ahead(self, first: float, updates: int, epoch: int) -> Controller:
        """Return a schedule by which a new run is checked before anything is measured.

        If batches depend on the rate, it is that of the short runs.
        """
        if self.settings.growth.goes_by_rate:
            return constant(self.settings, first, updates, epoch, self.world.size)
        settings = self.settings.with_rate(first)
        return settings.controller_of(epoch, self.world.size)


def unstable(results: RateResults, batch: int) -> str:
    """Return what to tell if no rate is stable."""
    rates = ", ".join(f"{result.lr:.4g}" for result in results.tried)
    return (
        f"lr.base=auto: no rate is stable at batch {batch} (tried {rates}): check loss and data; if runs are too short "
        "to show that the loss falls, raise lr.test.updates; else set lr.test.start lower, and go on with --resume"
    )


class _Log:
    """Write what is measured into metrics.jsonl and to stderr. Only the first rank has one."""

    def __init__(self, folder: RunFolder) -> None:
        events = list(read_events(folder.metrics))
        self._sfo, self._time_s = last_total(events), max((event.time_s for event in events), default=0.0)
        self._path = folder.metrics
        self._console = Console(stderr=True, highlight=False, soft_wrap=True, markup=False)

    def tried(self, result: RateResult) -> None:
        """Log a short run."""
        self._sfo, self._time_s = self._sfo + result.evaluations, self._time_s + result.seconds
        loss = finite(result.loss)
        spent = {"evaluations": result.evaluations, "seconds": result.seconds}
        self._write(RateTrial(**self._place(), lr=result.lr, loss=loss, **spent))
        self._console.print(result.line())

    def chosen(self, results: RateResults, base: float, updates: int, batch: int) -> None:
        """Log the choice."""
        largest, tried = results.largest, results.tried
        assert largest is not None
        self._write(
            RateChoice(
                **self._place(),
                base=base,
                largest_stable=largest,
                first_loss=finite(results.first.loss),
                lrs=[result.lr for result in tried],
                losses=[finite(result.loss) for result in tried],
                verdicts=["stable" if results.stable(result) else "unstable" for result in tried],
                batch=batch,
                updates=updates,
                evaluations=results.evaluations,
                seconds=results.seconds,
            )
        )
        self._console.print(f"lr.base={base:.4g}, where the largest stable rate of those tried is {largest:.4g}")

    def _place(self) -> Any:
        return {"step": 0, "samples": 0, "sfo": self._sfo, "time_s": self._time_s}

    def _write(self, event: RateTrial | RateChoice) -> None:
        lines = JSONL(self._path)
        lines.log(event.to_json())
        lines.flush()
        lines.close()


def _nothing(result: RateResult) -> None:
    """Do nothing."""
