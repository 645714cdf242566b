"""Trainer: runs the loop of updates; decides nothing itself."""

import time
from dataclasses import dataclass, replace
from typing import NamedTuple

from distgrow.checkpoint.manager import CheckpointManager
from distgrow.checkpoint.storage import Folder, Store
from distgrow.core.errors import Diverged, TrainingFailed
from distgrow.core.plan import Plan
from distgrow.core.progress import Outcome, Progress
from distgrow.data.dataset import facts_of
from distgrow.data.loader import DirectLoader, build_loader
from distgrow.data.stream import open_stream
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
from distgrow.tracking.events import End, OutOfMemory, Resize, Resume, Stage, Start, shape_of
from distgrow.training.evaluator import Evaluator
from distgrow.training.micro_batch import check_split, measured
from distgrow.training.spec import RunSpec
from distgrow.training.stream_state import StreamState, opened_stream


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Result:
    """Hold what a run ended with."""

    progress: Progress
    metrics: dict[str, float]  #: of the test set; empty without one or if the run was stopped early
    finished: bool  #: False: a request stopped it, or a group of another size goes on with it; after a checkpoint

    def __repr__(self) -> str:
        """Return a line: what has been done, and the metrics. `progress` has all counts."""
        progress, metrics = self.progress, "".join(f", {name}={value:.6g}" for name, value in self.metrics.items())
        state = "finished" if self.finished else "stopped, to be resumed"
        done = (
            f"{progress.step:,} updates, {progress.samples:,} samples, {progress.ledger.total:,} gradient evaluations"
        )
        return f"<Result: {state}, {done}{metrics}>"


class Votes(NamedTuple):
    """Hold what a rank wants, or, once the update has brought them together, what any rank wants."""

    stop: bool  #: write a checkpoint and end
    save: bool  #: write a checkpoint
    writing: bool  #: a file of the last checkpoint is still being written


class Trainer:
    """Hold the parts of one run, and run its loop."""

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
        self.folder, self.run, self.world, self.requests = folder, run, world, stop
        facts = {"training samples": controller.epoch, **facts_of(task.train)}
        store = store or Folder(folder.checkpoints)
        stream = opened_stream(task, run, world)
        self.loader = build_loader(stream, controller, world, run.loader)
        data = StreamState(stream, self.loader, world)
        self.checkpoints = CheckpointManager(store, engine, folder, run.checkpoint, world, self.events, facts, data)
        self.evaluator = Evaluator(task, controller, engine, run, world)
        self.shown_stage = -1

    def begin(self, *, measure: bool) -> Result:
        """Train a new run from its first sample. With `measure`, first find the micro-batch that memory holds."""
        progress, samples = self.checkpoints.first(), self.controller.samples()
        place, folder = self.events.place(progress), str(self.folder.path)
        self.events.log(Start(**place, dir=folder, world=self.world.size, budget_samples=samples))
        return self.train(self.checkpoints.save(self.measured(progress) if measure else progress))

    def resume(self, *, measure: bool) -> Result:
        """Train on from the newest intact checkpoint, charged with the evaluations that were made beyond it."""
        began = time.monotonic()
        loaded = self.checkpoints.load()
        restore_s = time.monotonic() - began
        if loaded is None:
            return self.begin(measure=measure)  # it was killed before its first checkpoint
        self.events.began -= loaded.seconds
        self.evaluator.resume(loaded.evaluated)
        progress = loaded.progress
        place, replayed = self.events.place(progress), progress.ledger.replayed
        event = Resume(
            **place, checkpoint=loaded.name, damaged=loaded.damaged, restore_s=restore_s, sfo_replayed=replayed
        )
        self.events.log(event)
        self.log_resize(progress)
        if self.evaluator.evaluation_due(progress):
            self.evaluator.evaluate(progress, self.events)  # the run was stopped between the update and this
        measure = measure and progress.micro_limit is None and not self.controller.done(progress)
        return self.train(self.measured(self.controller.advance(progress)) if measure else progress)

    def log_resize(self, progress: Progress) -> None:
        """Log that a group of another size left the run to this one, if so. The time between counts as the run's."""
        group, request = self.controller.group, self.world.on_rank0(lambda: resize_request.answered(self.folder))
        if group is None or request is None:
            return
        seconds = request.seconds
        self.events.began = time.monotonic() - request.time_s - seconds
        place = self.events.place(progress)
        self.events.log(Resize(**place, old=request.old, new=self.world.size, wanted=group.asked, seconds=seconds))

    def train(self, progress: Progress) -> Result:
        """Make one update after the other, until the budget is spent or a request stops the run."""
        while not self.controller.done(progress):
            if self.evaluator.probe_due(progress):
                progress = self.evaluator.probe(progress, self.events)
                continue  # its evaluations may have used up the budget
            progress = self.controller.advance(progress)
            if self.controller.hands_over(progress.stage):
                return self.hand_over(progress)
            plan = self.controller.plan(progress)
            self.announce(progress, plan)
            votes, began = self.votes(progress, plan.batch), time.monotonic()
            outcome = self.engine.update(plan, self.loader.draw(progress, plan), votes)
            before, progress = progress, self.controller.after(progress, plan, outcome)
            if outcome.out_of_memory:
                self.shrink(before, progress, plan)
                continue
            self.log(before, progress, plan, outcome, time.monotonic() - began)
            votes = Votes(*outcome.votes)
            if votes.stop or progress.skips >= self.run.max_skips:
                return self.stop_early(progress)
            if self.evaluator.evaluation_due(progress):
                self.evaluator.evaluate(progress, self.events)
            self.checkpoints.after(progress, due=votes.save, writing=votes.writing)
        return self.finish(progress)

    def votes(self, progress: Progress, batch: int) -> Votes:
        """Return what this rank wants after the coming update of `batch` samples."""
        requests = self.requests.poll()
        save = self.checkpoints.due(progress, batch=batch, requested=requests.checkpoint)
        return Votes(stop=requests.stop, save=save, writing=self.checkpoints.writing())

    def measured(self, progress: Progress) -> Progress:
        """Find the micro-batch that memory holds (max_micro=auto), and return the progress that records it."""
        stream = open_stream(self.task.train, seed=self.run.seed, collate=self.task.collate)
        rows = DirectLoader(stream, self.world.rank)
        return measured(self.controller, self.engine, rows, progress, self.events)

    def shrink(self, before: Progress, progress: Progress, plan: Plan) -> None:
        """After a rank ran out of memory, try the same batch again in micro-batches half as large.

        Raises:
            TrainingFailed: there are none so small, once a checkpoint is written.
        """
        place = self.events.place(progress)
        self.events.log(OutOfMemory(**place, **shape_of(plan), sfo_discarded=progress.ledger.discarded))
        try:
            check_split(self.controller, progress)
        except TrainingFailed:
            self.checkpoints.save(replace(progress, micro_limit=before.micro_limit))
            raise
        self.announce(progress, self.controller.plan(progress), again=True)

    def finish(self, progress: Progress) -> Result:
        """Make the last probe, the last checkpoint and the last evaluation."""
        progress = self.evaluator.last(progress, self.events)
        self.checkpoints.save(progress)
        metrics = self.evaluator.evaluate(progress, self.events)
        self.events.log(End(**self.events.place(progress), reason="done"))
        return Result(progress=progress, metrics=metrics, finished=True)

    def stop_early(self, progress: Progress) -> Result:
        """Write a checkpoint and end, on request (a signal, RUN/.stop) or because updates are not finite.

        Raises:
            Diverged: too many updates in a row were not finite.
        """
        self.checkpoints.save(progress)
        failed = progress.skips >= self.run.max_skips
        reason = "too many updates in a row were not finite" if failed else "stopped on request"
        self.events.log(End(**self.events.place(progress), reason=reason))
        if failed:
            empty = "" if self.task.items is None else ", or let items count more than 0"
            raise Diverged(
                f"{progress.skips} updates in a row were not finite (run.max_skips={self.run.max_skips}); lower "
                f"lr.base or set optimizer.clip{empty}; the "
                f"checkpoint of step {progress.step} holds the last good parameters"
            )
        return Result(progress=progress, metrics={}, finished=False)

    def hand_over(self, progress: Progress) -> Result:
        """Write a checkpoint and end. A group of the size that the coming stage wants goes on."""
        request = ResizeRequest(old=self.world.size, asked_at=time.time(), time_s=self.events.seconds())
        if self.world.sum([self.requests.poll().stop])[0]:
            return self.stop_early(progress)
        self.checkpoints.save(progress)
        self.world.on_rank0(lambda: resize_request.ask(self.folder, request))
        return Result(progress=progress, metrics={}, finished=False)

    def announce(self, progress: Progress, plan: Plan, *, again: bool = False) -> None:
        """Log a stage when it begins, or when it goes on `again` in other micro-batches."""
        if again or plan.stage != self.shown_stage:
            self.shown_stage = plan.stage
            epoch = progress.samples / self.controller.epoch
            self.events.log(
                Stage(**self.events.place(progress), epoch=epoch, stage=plan.stage, **shape_of(plan), lr=plan.lr)
            )

    def log(self, before: Progress, progress: Progress, plan: Plan, outcome: Outcome, seconds: float) -> None:
        """Log the step line of this update, unless run.log_every leaves it out. Only rank 0 has where to log it."""
        epoch = self.controller.epoch
        logs = self.run.logs((before.step, before.samples), (progress.step, progress.samples), epoch)
        if self.world.rank > 0 or (outcome.applied and not logs):
            return
        rate = plan.batch / seconds if seconds > 0 else 0.0
        self.events.update(progress, plan, outcome, epoch=epoch, samples_per_s=rate)
