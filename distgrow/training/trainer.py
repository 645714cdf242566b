"""Trainer: runs the loop of updates; decides nothing itself."""

import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

from distgrow.checkpoint.manager import CheckpointManager
from distgrow.checkpoint.storage import Folder, Store
from distgrow.core.errors import Diverged, TrainingFailed
from distgrow.core.plan import Plan
from distgrow.core.progress import Outcome, Progress
from distgrow.data.dataset import facts_of
from distgrow.data.loader import DirectLoader, build_loader
from distgrow.data.stream import open_stream
from distgrow.distributed.world import World
from distgrow.engine.protocol import Engine
from distgrow.growth.controller import Controller
from distgrow.run import resize_request
from distgrow.run.folder import RunFolder
from distgrow.run.resize_request import ResizeRequest
from distgrow.run.stop import StopRequests
from distgrow.tasks.task import Task, test_sets
from distgrow.tracking.base import Tracker
from distgrow.tracking.event_log import EventLog
from distgrow.tracking.events import End, OutOfMemory, Resize, Resume, Stage, Start
from distgrow.tracking.update_event import shape_of
from distgrow.training.branches import Branches
from distgrow.training.evaluator import Evaluator
from distgrow.training.hook_calls import Hooks
from distgrow.training.kept_states import kept_states
from distgrow.training.micro_batch import check_split, measured
from distgrow.training.result import Result
from distgrow.training.spec import RunSpec
from distgrow.training.stream_state import StreamState, opened_stream


class Votes(NamedTuple):
    """Hold what a rank wants, or, once the update has brought them together, what any rank wants."""

    stop: bool  #: write a checkpoint and end
    save: bool  #: write a checkpoint
    writing: bool  #: a file of the last checkpoint is still being written
    end: bool  #: a hook ends the run


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
        hooks: Sequence[Any] = (),
        origin: list[str] | None = None,
    ) -> None:
        self.task, self.controller, self.engine, self.events = task, controller, engine, EventLog(track)
        self.folder, self.run, self.world, self.requests = folder, run, world, stop
        facts = {"training samples": controller.epoch, **facts_of(task.train)}
        store = store or Folder(folder.checkpoints)
        self.hooks = Hooks(hooks, world, folder.path, controller.epoch)
        stream = opened_stream(task, run, world, controller.sampling)
        self.loader = build_loader(stream, controller, world, run.loader)
        kept = (StreamState(stream, self.loader, world), self.hooks)
        self.checkpoints = CheckpointManager(store, engine, folder, run.checkpoint, world, self.events, facts, *kept)
        self.evaluator = Evaluator(task, controller, engine, run, world)
        states = partial(kept_states, engine, folder, world)
        self.branches = Branches(controller, engine, self.loader, self.evaluator, self.events, states)
        self.shown_stage, self.origin = -1, origin or None

    def begin(self, *, measure: bool) -> Result:
        """Train a new run from its first sample. With `measure`, first find the micro-batch that memory holds."""
        progress, samples = self.checkpoints.first(), self.controller.samples()
        place, folder = self.events.place(progress), str(self.folder.path)
        groups, world = self.engine.groups or None, self.world.size
        self.events.log(
            Start(**place, dir=folder, world=world, budget_samples=samples, groups=groups, init=self.origin)
        )
        self.begin_hooks(progress, resumed=False)
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
        self.begin_hooks(progress, resumed=True)
        if self.evaluator.evaluation_due(progress):  # the run was stopped between the update and this
            progress = self.evaluated(progress)
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
            if self.branches.due(progress):
                progress, stop = self.branched(progress)
                if stop:
                    return self.stop_early(progress)
                continue
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
            self.tell(before, progress, plan, outcome, time.monotonic() - began)
            votes = Votes(*outcome.votes)
            if votes.stop or outcome.fault or (outcome.told and progress.skips >= self.run.max_skips):
                return self.stop_early(progress, outcome.fault)
            if votes.end:
                progress = replace(progress, ended=self.hooks.reason())
            if self.evaluator.evaluation_due(progress):
                progress = self.evaluated(progress)
            self.checkpoints.after(progress, due=votes.save, writing=votes.writing)
        return self.finish(progress)

    def branched(self, progress: Progress) -> tuple[Progress, bool]:
        """Make the branches that are due, unless a hook wants the end. Return where the run is, and whether to stop."""
        if self.world.sum([float(self.hooks.wants_end())])[0]:
            return replace(progress, ended=self.hooks.reason()), False
        progress, stop = self.branches.test(progress, self)
        if not stop and self.evaluator.evaluation_due(progress):
            progress = self.evaluated(progress)
        return progress, stop or progress.skips >= self.run.max_skips

    def votes(self, progress: Progress, batch: int) -> Votes:
        """Return what this rank wants after the coming update of `batch` samples."""
        requests = self.requests.poll()
        save = self.checkpoints.due(progress, batch=batch, requested=requests.checkpoint)
        writing, end = self.checkpoints.writing(), self.hooks.wants_end()
        return Votes(stop=requests.stop, save=save, writing=writing, end=end)

    def begin_hooks(self, progress: Progress, *, resumed: bool) -> None:
        """Let the hooks begin. Collective: every rank must call."""
        self.hooks.begin(progress, self.task.model, list(test_sets(self.task.test)), resumed=resumed)

    def evaluated(self, progress: Progress) -> Progress:
        """Evaluate, and return the progress that a hook may have ended. Collective: every rank must call."""
        asked = self.hooks.after_eval(progress, self.evaluator.evaluate(progress, self.events))
        self.checkpoints.keep(progress, asked.keep)
        return progress if asked.end is None else replace(progress, ended=asked.end)

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
        """End the run: hear what the last update gave, apply what is in flight, and probe, save and evaluate.

        If something in flight could not be applied, and the budget has as much left, train on.
        """
        last, drained = self.engine.last(), self.engine.drain()
        if last is not None:
            plan, outcome = last
            before, progress = progress, self.controller.heard(progress, plan, outcome)
            self.tell(before, progress, plan, outcome)
        if drained:
            self.checkpoints.outdate()
            self.evaluator.outdate()
            if (withdrawn := self.engine.withdrawn()) is not None:
                progress = progress.without(withdrawn, skips=progress.skips)
        if progress.skips >= self.run.max_skips:
            return self.stop_early(progress)
        if not self.controller.done(progress):
            return self.train(progress)
        progress = self.evaluator.last(progress, self.events)
        if not self.hooks.stateful:
            self.checkpoints.save(progress)
        self.evaluated(progress)
        self.checkpoints.save(progress)  # with what hooks have kept of the last evaluation
        metrics, reason = self.evaluator.evaluate(progress, self.events), progress.ended or "done"
        self.hooks.end(progress, reason=reason, finished=True, metrics=metrics)
        self.events.log(End(**self.events.place(progress), reason=reason))
        return Result(progress=progress, metrics=metrics, finished=True, dir=self.folder.path, reason=reason)

    def stop_early(self, progress: Progress, fault: str | None = None) -> Result:
        """Write a checkpoint and end, on request (a signal, RUN/.stop), because of a fault, or of updates not finite.

        Raises:
            Diverged: too many updates in a row were not finite.
            TrainingFailed: there is a fault.
        """
        self.checkpoints.save(progress)
        failed = progress.skips >= self.run.max_skips
        reason = fault or ("too many updates in a row were not finite" if failed else "stopped on request")
        self.events.log(End(**self.events.place(progress), reason=reason))
        if fault:
            raise TrainingFailed(f"{fault}; the checkpoint of step {progress.step} holds all: go on with --resume")
        if failed:
            empty = "" if self.task.items is None else ", or let items count more than 0"
            many = f"{progress.skips} updates in a row were" if progress.skips > 1 else "1 update was"
            raise Diverged(
                f"{many} not finite (run.max_skips={self.run.max_skips}); lower "
                f"lr.base or set optimizer.clip{empty}; the "
                f"checkpoint of step {progress.step} holds the last good parameters"
            )
        self.hooks.end(progress, reason=reason, finished=False, metrics={})
        return Result(progress=progress, metrics={}, finished=False, dir=self.folder.path, reason=reason)

    def hand_over(self, progress: Progress) -> Result:
        """Write a checkpoint and end. A group of the size that the coming stage wants goes on."""
        request = ResizeRequest(old=self.world.size, asked_at=time.time(), time_s=self.events.seconds())
        if self.world.sum([self.requests.poll().stop])[0]:
            return self.stop_early(progress)
        self.checkpoints.save(progress)
        self.world.on_rank0(lambda: resize_request.ask(self.folder, request))
        reason = "handed over to another number of ranks"
        self.hooks.end(progress, reason=reason, finished=False, metrics={})
        return Result(progress=progress, metrics={}, finished=False, dir=self.folder.path, reason=reason)

    def announce(self, progress: Progress, plan: Plan, *, again: bool = False) -> None:
        """Log a stage when it begins, or when it goes on `again` in other micro-batches."""
        if again or plan.stage != self.shown_stage:
            self.shown_stage = plan.stage
            epoch = progress.samples / self.controller.epoch
            shape: dict[str, Any] = {**shape_of(plan), **self.engine.settings(plan)}
            self.events.log(Stage(**self.events.place(progress), epoch=epoch, stage=plan.stage, lr=plan.lr, **shape))

    def tell(self, before: Progress, progress: Progress, plan: Plan, outcome: Outcome, seconds: float = 0) -> None:
        """Log the line of the update that `outcome` is of, and call the hooks. `progress` knows what it gave."""
        if not outcome.told:
            return
        if outcome.of is not None:
            plan, progress = outcome.of, before.as_if_known(outcome, progress.noise)
        self.log(progress, plan, outcome, seconds)
        self.hooks.after_update(progress, plan, outcome)

    def log(self, progress: Progress, plan: Plan, outcome: Outcome, seconds: float) -> None:
        """Log the step line of an update, unless run.log_every leaves it out. Only rank 0 has where to log it."""
        before, here = (progress.step - 1, progress.samples - plan.batch), (progress.step, progress.samples)
        logs = not outcome.applied or self.run.logs(before, here, self.controller.epoch)
        if self.world.rank > 0 or not progress.samples or not logs:
            return
        rate = plan.batch / seconds if seconds > 0 else 0.0
        self.events.update(progress, plan, outcome, epoch=self.controller.epoch, samples_per_s=rate)
