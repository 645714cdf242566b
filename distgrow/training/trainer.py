"""Trainer: the loop that turns decisions into updates; it decides nothing itself."""

import time
from dataclasses import dataclass, replace

from distgrow.checkpoint.manager import CheckpointManager
from distgrow.checkpoint.storage import Folder, Store
from distgrow.core.errors import Diverged, TrainingFailed
from distgrow.core.plan import Plan
from distgrow.core.progress import Outcome, Progress
from distgrow.data.loader import DirectLoader, build_loader
from distgrow.data.stream import SampleStream
from distgrow.distributed.world import World
from distgrow.engine.spec import Engine
from distgrow.growth.controller import Controller
from distgrow.run import resize_request
from distgrow.run.folder import RunFolder
from distgrow.run.resize_request import ResizeRequest
from distgrow.run.stop import StopRequests
from distgrow.tasks.task import Task
from distgrow.tracking.base import Tracker
from distgrow.tracking.event_log import EventLog
from distgrow.tracking.events import Checkpoint, End, OutOfMemory, Resize, Resume, Stage, Start, shape_of, update_event
from distgrow.training.evaluator import Evaluator
from distgrow.training.micro_batch import check_split, measured
from distgrow.training.spec import RunSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What a run ended with."""

    progress: Progress
    metrics: dict[str, float]  #: of the test set; empty without one or where the run was stopped early
    finished: bool  #: False: SIGTERM stopped it, or a group of another size goes on with it; after a checkpoint


class Trainer:
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
        store: Store | None = None,
    ) -> None:
        self.task, self.controller, self.engine, self.events = task, controller, engine, EventLog(track)
        self.folder, self.run, self.world, self.stop_requested = folder, run, world, stop
        facts = {"training samples": controller.epoch}
        store = store or Folder(folder.checkpoints)
        self.checkpoints = CheckpointManager(store, engine, folder, run.checkpoint, world, facts)
        self.positions = SampleStream(task.train, seed=run.seed, collate=task.collate)
        self.loader = build_loader(self.positions, controller, world, run.loader)
        self.evaluator = Evaluator(task, controller, engine, run, world)
        self.shown_stage = -1

    def begin(self, *, measure: bool) -> Result:
        """Train a new run from its first sample; with `measure`, find out what micro-batch memory holds."""
        progress, samples = Progress(), self.controller.samples()
        place, folder = self.events.place(progress), str(self.folder.path)
        self.events.log(Start(**place, dir=folder, world=self.world.size, budget_samples=samples))
        return self.train(self.saved(self.measured(progress) if measure else progress))

    def resume(self, *, measure: bool) -> Result:
        """The run goes on from its newest intact checkpoint, charged with what it had done beyond that."""
        began = time.monotonic()
        found = self.checkpoints.find()
        restore_s = time.monotonic() - began
        if found is None:
            return self.begin(measure=measure)  # it was killed before its first checkpoint
        self.events.began -= found.seconds
        progress = found.progress
        place, replayed = self.events.place(progress), progress.ledger.replayed
        facts = Resume(
            **place, checkpoint=found.name, damaged=found.damaged, restore_s=restore_s, sfo_replayed=replayed
        )
        self.events.log(facts)
        self.take_over(progress)
        measure = measure and progress.micro_limit is None and not self.controller.done(progress)
        return self.train(self.measured(self.controller.advance(progress)) if measure else progress)

    def take_over(self, progress: Progress) -> None:
        """Say so where a group of another size has left the run to this one; the time between counts as the run's."""
        group, request = self.controller.group, self.world.on_rank0(lambda: resize_request.answered(self.folder))
        if group is None or request is None:
            return
        seconds = request.seconds
        self.events.began = time.monotonic() - request.time_s - seconds
        place = self.events.place(progress)
        self.events.log(Resize(**place, old=request.old, new=self.world.size, wanted=group.asked, seconds=seconds))

    def train(self, progress: Progress) -> Result:
        """The path of every global batch, until the budget is spent or somebody asks to stop."""
        while not self.controller.done(progress):
            if self.evaluator.probe_due(progress):
                progress = self.evaluator.probe(progress, self.events)
                continue  # its evaluations may have used up the budget
            progress = self.controller.advance(progress)
            if self.controller.hands_over(progress.stage):
                return self.hand_over(progress)
            plan = self.controller.plan(progress)
            self.announce(progress, plan)
            stop, asked = self.stop_requested(), self.stop_requested.checkpoint()
            votes = (stop, self.checkpoints.due(progress, asked=asked), self.checkpoints.writing())
            began = time.monotonic()
            outcome = self.engine.update(plan, self.loader.draw(progress, plan), votes)
            before, progress = progress, progress.after(plan, outcome)
            if outcome.out_of_memory:
                self.shrink(before, progress, plan)
                continue
            self.log(progress, plan, outcome, time.monotonic() - began)
            stop, save, writing = outcome.votes
            if stop or progress.skips >= self.run.max_skips:
                return self.stop_early(progress)
            if self.evaluator.evaluation_due(before, progress):
                self.evaluator.evaluate(progress, self.events)
            if self.checkpoints.current and not writing:
                self.settle()
            if save:
                self.written()  # one before it that takes longer than an interval is waited for: no more can be lost
                self.checkpoints.begin(progress)
        return self.finish(progress)

    def measured(self, progress: Progress) -> Progress:
        """max_micro=auto: the progress that knows how many rows memory holds."""
        rows = DirectLoader(self.positions, self.world.rank)
        return measured(self.controller, self.engine, rows, progress, self.events)

    def shrink(self, before: Progress, progress: Progress, plan: Plan) -> None:
        """A rank ran out of memory: the same batch comes again, in micro-batches half as large, if there are such."""
        place = self.events.place(progress)
        self.events.log(OutOfMemory(**place, **shape_of(plan), sfo_discarded=progress.ledger.discarded))
        try:
            check_split(self.controller, progress)
        except TrainingFailed:
            self.saved(replace(progress, micro_limit=before.micro_limit))
            raise
        self.announce(progress, self.controller.plan(progress), again=True)

    def finish(self, progress: Progress) -> Result:
        """The last probe, the last checkpoint, the last evaluation."""
        progress = self.evaluator.last(progress, self.events)
        self.saved(progress)
        metrics = self.evaluator.evaluate(progress, self.events)
        self.events.log(End(**self.events.place(progress), reason="done"))
        return Result(progress=progress, metrics=metrics, finished=True)

    def stop_early(self, progress: Progress) -> Result:
        """A checkpoint, then the end: asked for (SIGTERM, RUN/.stop), or forced by updates that are not finite."""
        self.saved(progress)
        failed = progress.skips >= self.run.max_skips
        reason = "too many updates in a row were not finite" if failed else "stopped on request"
        self.events.log(End(**self.events.place(progress), reason=reason))
        if failed:
            raise Diverged(
                f"{progress.skips} updates in a row were not finite (run.max_skips={self.run.max_skips}); lower "
                f"lr.base or set optimizer.clip; the checkpoint of step {progress.step} holds the last good parameters"
            )
        return Result(progress=progress, metrics={}, finished=False)

    def hand_over(self, progress: Progress) -> Result:
        """A checkpoint, then the end: a group of the size that the coming stage wants goes on."""
        request = ResizeRequest(old=self.world.size, asked_at=time.time(), time_s=self.events.seconds())
        if self.world.sum([self.stop_requested()])[0]:
            return self.stop_early(progress)
        self.saved(progress)
        self.world.on_rank0(lambda: resize_request.ask(self.folder, request))
        return Result(progress=progress, metrics={}, finished=False)

    def saved(self, progress: Progress) -> Progress:
        """The same progress, once a checkpoint holds it."""
        self.written()
        if not self.checkpoints.saved(progress):
            self.checkpoints.begin(progress)
            self.written()
        return progress

    def written(self) -> None:
        """Wait until no checkpoint is being written."""
        while self.checkpoints.current:
            self.settle()

    def settle(self) -> None:
        """Go on with the checkpoint that is being written."""
        if kept := self.checkpoints.settle():
            place = self.events.place(kept.progress)
            self.events.log(Checkpoint(**place, path=kept.name, seconds=kept.seconds, stall_s=kept.stall_s))

    def announce(self, progress: Progress, plan: Plan, *, again: bool = False) -> None:
        """Say so when a stage begins, or goes on `again` in other micro-batches."""
        if again or plan.stage != self.shown_stage:
            self.shown_stage = plan.stage
            epoch = progress.samples / self.controller.epoch
            self.events.log(
                Stage(**self.events.place(progress), epoch=epoch, stage=plan.stage, **shape_of(plan), lr=plan.lr)
            )

    def log(self, progress: Progress, plan: Plan, outcome: Outcome, seconds: float) -> None:
        """The step line of this update."""
        if outcome.applied and progress.step % self.run.log_every:
            return
        rate = plan.batch / seconds if seconds > 0 else 0.0
        now, epoch = self.events.seconds(), self.controller.epoch
        self.events.log(update_event(progress, plan, outcome, epoch=epoch, time_s=now, samples_per_s=rate))
