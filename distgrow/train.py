"""fit(): the loop that turns decisions into updates; it decides nothing itself."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from distgrow import checkpoint
from distgrow.controller import Controller
from distgrow.data import Positions, build_loader, evaluation_batches
from distgrow.engine import SGD, Engine, EngineSpec, Optimizer, Torch
from distgrow.engine.batches import Loss, Metrics
from distgrow.lr import LR
from distgrow.plan import Plan
from distgrow.progress import Outcome, Progress, finite
from distgrow.run import RunFolder, RunSpec, StopRequests, TrainingFailed
from distgrow.schedule import Growth
from distgrow.spec import ConfigError, Spec
from distgrow.stages import Budget, Stages
from distgrow.tasks import Task
from distgrow.track import RESERVED, Tracker, last_total, read_events, step_event, tracking
from distgrow.world import World, joined


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What a run ended with."""

    progress: Progress
    metrics: dict[str, float]  #: of the test set; empty without one or where the run was stopped early
    finished: bool  #: False: SIGTERM stopped it, after a checkpoint


def fit(
    model: nn.Module,
    loss: Loss,
    train: Any,
    *,
    growth: Growth,
    budget: Budget,
    test: Any = None,
    metrics: Metrics | None = None,
    collate: Callable[[list[Any]], Any] | None = None,
    stages: Stages | None = None,
    lr: LR | None = None,
    optimizer: Optimizer | None = None,
    engine: EngineSpec | None = None,
    run: RunSpec | None = None,
    resume: bool | None = False,
    about: Mapping[str, Any] | None = None,
) -> Result:
    """Train `model` in place by a growth schedule; the same in one process, under torchrun and in a Ray worker.

    `loss(model, batch)` is the mean over the batch's rows; `metrics(model, batch)` are means over rows, for `test`;
    `train` and `test` are map-style data sets. `resume` None goes on where the run's folder holds a run and begins
    one where it does not. `about` is recorded in config.yaml beside the settings.
    Collective: every rank must call. Raises ValueError (RunError where the run folder is at fault) for settings
    that cannot work, TrainingFailed where too many updates in a row are not finite.
    """
    task = Task(model=model, loss=loss, train=train, test=test, metrics=metrics, collate=collate)
    if test is not None and len(test) == 0:
        raise ConfigError("the test set is empty; leave it out, or give it samples")
    stages, lr, optimizer = stages or Stages(), lr or LR(), optimizer or SGD()
    engine, run = engine or Torch(), run or RunSpec()
    specs: dict[str, Spec] = {"growth": growth, "stages": stages, "lr": lr, "optimizer": optimizer}
    specs |= {"engine": engine, "budget": budget, "run": run}
    settings = {**(about or {}), **{name: spec.model_dump(mode="json") for name, spec in specs.items()}}
    folder = RunFolder(run.dir)
    stop = StopRequests(folder)
    with stop.watched(), joined(engine.device, alone=engine.needs_group) as world:
        schedule: dict[str, Any] = {"growth": growth, "stages": stages, "lr": lr, "budget": budget, "seed": run.seed}
        controller = Controller(**schedule, epoch=len(train), world=world.size, max_micro=engine.max_micro)
        controller.check()
        with opened(folder, world, settings, resume=resume) as begun:
            torch.manual_seed(run.seed)
            machine = engine.build(model, loss, metrics=metrics, optimizer=optimizer, world=world)
            with tracking(folder, world.rank, controller.samples()) as tracker:
                job = Job(task, controller, machine, tracker, folder, run, world, stop)
                return job.resume() if begun else job.begin()


@contextmanager
def opened(folder: RunFolder, world: World, settings: Mapping[str, Any], *, resume: bool | None) -> Iterator[bool]:
    """The run's folder is locked for as long as the context lasts; whether it holds a run to go on with. Collective."""
    world.once(lambda: folder.lock(wait_s=20 if resume is None else 0))  # a killed group may still be ending
    try:
        begun = world.once(folder.begun) if resume is None else resume
        world.once(lambda: folder.reopen(settings) if begun else folder.create(settings))
        yield begun
    finally:
        folder.unlock()


class Job:
    """One run under way: the parts that the loop needs at hand."""

    def __init__(
        self,
        task: Task,
        controller: Controller,
        engine: Engine,
        track: Tracker,
        folder: RunFolder,
        run: RunSpec,
        world: World,
        stop: StopRequests,
    ) -> None:
        self.task, self.controller, self.engine, self.track = task, controller, engine, track
        self.folder, self.run, self.world, self.stop_requested = folder, run, world, stop
        self.facts = {"training samples": controller.epoch}
        positions = Positions(task.train, seed=run.seed, collate=task.collate)
        self.loader = build_loader(positions, controller, world, run.loader)
        self.began = self.saved_at = time.monotonic()  # a resumed run's `began` counts what came before it
        self.saved_step, self.saved_samples = 0, -1
        self.charged = 0  # SFO total that this process did not evaluate itself
        self.shown_stage = -1

    def begin(self) -> Result:
        """A new run, from its first sample."""
        samples = self.controller.samples()
        self.event("start", Progress(), dir=str(self.folder.path), world=self.world.size, budget_samples=samples)
        self.save(Progress())
        return self.train(Progress())

    def resume(self) -> Result:
        """The run goes on from its newest intact checkpoint, charged with what it had done beyond that."""
        found = self.world.once(self.find)
        if found is None:
            return self.begin()  # it was killed before its first checkpoint
        path, progress, damaged, seconds = found
        self.engine.load(path)
        keep = self.run.checkpoint.keep
        self.world.once(lambda: checkpoint.clean(self.folder.checkpoints, keep=keep, current=path))
        self.began -= seconds
        self.charged, self.saved_step = progress.ledger.total, progress.step
        replayed = progress.ledger.replayed
        self.event("resume", progress, checkpoint=path.name, damaged=damaged, sfo_replayed=replayed)
        return self.train(progress)

    def find(self) -> tuple[Path, Progress, list[str], float] | None:
        """The newest intact checkpoint, the progress to go on with, what is damaged, and the seconds that the run took.

        None where no checkpoint was ever written.
        """
        events = read_events(self.folder.metrics)
        if not checkpoint.stored(self.folder.checkpoints) and all(event["event"] != "checkpoint" for event in events):
            return None
        path, progress, damaged = checkpoint.newest(self.folder.checkpoints)
        checkpoint.compare(path, self.facts)
        lost = max(0, last_total(events) - progress.ledger.total)
        seconds = max((event.get("time_s", 0.0) for event in events), default=0.0)
        return path, progress.replaying(lost), damaged, seconds

    def train(self, progress: Progress) -> Result:
        """The path of every global batch, until the budget is spent or somebody asks to stop."""
        while not self.controller.done(progress):
            progress = self.controller.advance(progress)
            plan = self.controller.plan(progress)
            self.announce(progress, plan)
            votes = (self.stop_requested(), self.save_is_due(progress))
            began = time.monotonic()
            outcome = self.engine.update(plan, self.loader.draw(progress, plan), votes)
            before, progress = progress, progress.after(plan, outcome)
            self.log(progress, plan, outcome, time.monotonic() - began)
            stop, save = outcome.votes
            if stop or progress.skips >= self.run.max_skips:
                return self.stop_early(progress)
            if self.eval_is_due(before, progress):
                self.evaluate(progress)
            if save:
                self.save(progress)
        return self.finish(progress)

    def finish(self, progress: Progress) -> Result:
        """The last checkpoint, the last evaluation."""
        self.save(progress)
        metrics = self.evaluate(progress)
        self.event("end", progress, reason="done")
        return Result(progress=progress, metrics=metrics, finished=True)

    def stop_early(self, progress: Progress) -> Result:
        """A checkpoint, then the end: asked for by SIGTERM, or forced by updates that are not finite."""
        self.save(progress)
        failed = progress.skips >= self.run.max_skips
        reason = "too many updates in a row were not finite" if failed else "stopped by SIGTERM"
        self.event("end", progress, reason=reason)
        if failed:
            raise TrainingFailed(
                f"{progress.skips} updates in a row were not finite (run.max_skips={self.run.max_skips}); lower "
                f"lr.base or set optimizer.clip; the checkpoint of step {progress.step} holds the last good parameters"
            )
        return Result(progress=progress, metrics={}, finished=False)

    def save(self, progress: Progress) -> None:
        """Compare the ledger with what the ranks really did, then write a checkpoint, unless this one is written."""
        if progress.samples == self.saved_samples:
            return
        began = time.monotonic()
        evaluated = int(self.world.sum([self.engine.evaluations])[0])
        if evaluated != progress.ledger.total - self.charged:
            raise RuntimeError(
                f"the ranks evaluated {evaluated} gradients but the ledger holds "
                f"{progress.ledger.total - self.charged}: does the data set or collate drop or add rows?"
            )
        keep = self.run.checkpoint.keep
        path = checkpoint.save(
            self.folder.checkpoints, self.engine, progress, keep=keep, world=self.world, facts=self.facts
        )
        self.saved_at, self.saved_step, self.saved_samples = time.monotonic(), progress.step, progress.samples
        self.event("checkpoint", progress, path=path.name, seconds=self.saved_at - began)

    def evaluate(self, progress: Progress) -> dict[str, float]:
        """Evaluate the test set, where there is one."""
        if self.task.test is None:
            return {}
        batches = evaluation_batches(self.task.test, self.world, self.run.eval.rows, self.task.collate)
        metrics = self.engine.evaluate(batches)
        if clash := RESERVED & metrics.keys():
            raise ConfigError(f"task.metrics returns {', '.join(sorted(clash))}, which every event has; rename it")
        epoch = progress.samples / self.controller.epoch
        self.event("eval", progress, epoch=epoch, **{name: finite(value) for name, value in metrics.items()})
        return metrics

    def save_is_due(self, progress: Progress) -> bool:
        """This rank's wish to checkpoint after the coming update; one rank's wish is enough."""
        every = self.run.checkpoint
        by_steps = every.every_steps is not None and progress.step + 1 - self.saved_step >= every.every_steps
        return by_steps or time.monotonic() - self.saved_at >= every.every_s

    def eval_is_due(self, before: Progress, after: Progress) -> bool:
        """Whether this update crossed an evaluation's place on the samples axis."""
        every = self.run.eval.every_epochs * self.controller.epoch
        return before.samples // every != after.samples // every and not self.controller.done(after)

    def announce(self, progress: Progress, plan: Plan) -> None:
        """Say so when a stage begins."""
        if plan.stage != self.shown_stage:
            self.shown_stage = plan.stage
            epoch = progress.samples / self.controller.epoch
            shape = {"batch": plan.batch, "micro": plan.micro, "accum": plan.accum, "world": plan.world, "lr": plan.lr}
            self.event("stage", progress, epoch=epoch, stage=plan.stage, **shape)

    def log(self, progress: Progress, plan: Plan, outcome: Outcome, seconds: float) -> None:
        """The step line of this update."""
        if outcome.applied and progress.step % self.run.log_every:
            return
        rate = plan.batch / seconds if seconds > 0 else 0.0
        now, epoch = time.monotonic() - self.began, self.controller.epoch
        self.track.log(step_event(progress, plan, outcome, epoch=epoch, time_s=now, samples_per_s=rate))

    def event(self, kind: str, progress: Progress, **values: Any) -> None:
        """Any other line of metrics.jsonl."""
        place = {"event": kind, "step": progress.step, "samples": progress.samples, "sfo": progress.ledger.total}
        self.track.log({**place, "time_s": time.monotonic() - self.began, **values})
