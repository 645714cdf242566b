"""Branches: tries batches by short branches of the run, in its own group; one goes on, the others are charged."""

import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Protocol

from distgrow.core.plan import Plan
from distgrow.core.progress import Ledger, Outcome, Progress, finite
from distgrow.data.loader import Loader
from distgrow.engine.protocol import Engine
from distgrow.growth.branch_decisions import begun, branches_due
from distgrow.growth.branching import Branched, Branching, Verdict, charge, spent_by_others
from distgrow.growth.controller import Controller
from distgrow.tracking.base_event import Place
from distgrow.tracking.branch_events import Branch, BranchTest
from distgrow.tracking.event_log import EventLog
from distgrow.tracking.events import OutOfMemory
from distgrow.tracking.update_event import shape_of
from distgrow.training.evaluator import Evaluator
from distgrow.training.kept_states import KeptStates
from distgrow.training.micro_batch import check_split


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """Hold an update of a branch."""

    before: Progress
    after: Progress
    plan: Plan
    outcome: Outcome
    seconds: float


@dataclass(slots=True, kw_only=True)
class Trail:
    """Hold the updates of a branch so far."""

    end: Progress
    made: list[Made] = field(default_factory=list)
    stopped: bool = False  #: a rank wants the run to stop

    def losses(self, start: int, windows: int, each: int) -> tuple[float, ...]:
        """Return the mean loss over each window of `each` samples from position `start` on; see Branched."""
        sums = [0.0] * windows
        for made in self.made:
            window = (made.before.samples - start) // each
            sums[window] += made.outcome.loss * made.plan.batch if made.outcome.applied else math.nan
            if not math.isfinite(sums[window]):
                sums[window:] = [math.nan] * (windows - window)
        return tuple(total / each for total in sums)


class RunLoop(Protocol):
    """What a run does around each update."""

    def votes(self, progress: Progress, batch: int) -> Sequence[bool]:
        """Return what this rank wants after an update; the first is that the run stops."""
        ...

    def announce(self, progress: Progress, plan: Plan) -> None:
        """Log a stage when it begins."""
        ...

    def tell(self, before: Progress, progress: Progress, plan: Plan, outcome: Outcome, seconds: float = 0) -> None:
        """Log an update and call the hooks."""
        ...


class Branches:
    """Make the tests of one run that its growth asks for. `test` is collective."""

    def __init__(
        self,
        controller: Controller,
        engine: Engine,
        loader: Loader,
        evaluator: Evaluator,
        events: EventLog,
        states: Callable[[], AbstractContextManager[KeptStates]],
    ) -> None:
        """Take the parts of a run.

        Args:
            controller: Decides.
            engine: Computes.
            loader: Draws.
            evaluator: Measures the loss of the evaluation set.
            events: The log.
            states: Returns a context that keeps states of the engine.
        """
        self._controller, self._engine, self._loader = controller, engine, loader
        self._evaluator, self._events, self._states = evaluator, events, states

    def due(self, progress: Progress) -> bool:
        """Return whether growth wants branches before the coming update."""
        return branches_due(self._controller, progress)

    def test(self, progress: Progress, run: RunLoop) -> tuple[Progress, bool]:
        """Make the branches that are due. Return where the winner ends, and whether a rank wants the run to stop.

        If one does, the run is where it was before, and what was evaluated is discarded.
        """
        began, trails, growth = time.monotonic(), list[Trail](), self._controller.growth
        assert isinstance(growth, Branching)
        with self._states() as states:
            states.keep("start")
            results = self._branched(growth, progress, trails, states, run)
            if results is None:
                states.go_back("start")
                return _given_up(progress, trails), True
            verdict = growth.verdict(results)
            if verdict.winner < len(trails) - 1:
                states.go_back(str(verdict.winner))
        spent = spent_by_others(progress, [trail.end for trail in trails], verdict.winner)
        self._log(growth, progress, trails, results, verdict, spent, time.monotonic() - began)
        return _told(growth, progress, trails, verdict.winner, spent, run), False

    def _branched(
        self, growth: Branching, progress: Progress, trails: list[Trail], states: KeptStates, run: RunLoop
    ) -> list[Branched] | None:
        """Make all branches, and keep where each but the last ends; None: the run is to stop."""
        results, limit = list[Branched](), progress.micro_limit
        candidates = growth.candidates(progress)
        for number, candidate in enumerate(candidates):
            if number:
                states.keep(str(number - 1))
                states.go_back("start")
            trails.append(Trail(end=begun(self._controller, replace(progress, micro_limit=limit), candidate)))
            self._follow(growth, progress, trails, run)
            limit = trails[-1].end.micro_limit
            if trails[-1].stopped:
                return None
            results.append(self._shown(growth, progress, trails[-1]))
            if number < len(candidates) - 1:
                self._log_branch(progress, trails, results[-1])
        return results

    def _follow(self, growth: Branching, start: Progress, trails: Sequence[Trail], run: RunLoop) -> None:
        """Make the updates of the last of the branches that began at `start`."""
        last, trail = start.samples + growth.branch_samples(start.stage), trails[-1]
        while trail.end.samples < last and not trail.stopped:
            before, plan = trail.end, self._controller.plan(trail.end)
            votes, began = run.votes(before, plan.batch), time.monotonic()
            outcome = self._engine.update(plan, self._loader.draw(before, plan), votes)
            trail.end = self._controller.after(before, plan, outcome)
            if outcome.out_of_memory:
                self._shrink(start, trails, plan)
                continue
            seconds = time.monotonic() - began
            trail.made.append(Made(before=before, after=trail.end, plan=plan, outcome=outcome, seconds=seconds))
            trail.stopped = outcome.votes[0]
        assert trail.stopped or trail.end.samples == last, "branches end at the same sample"

    def _shrink(self, start: Progress, trails: Sequence[Trail], plan: Plan) -> None:
        """Log that memory did not hold a micro-batch. Raise TrainingFailed if there are none so small."""
        lost = sum(trail.end.ledger.discarded - start.ledger.discarded for trail in trails)
        self._events.log(
            OutOfMemory(**self._place(start, trails), **shape_of(plan), sfo_discarded=start.ledger.discarded + lost)
        )
        check_split(self._controller, trails[-1].end)

    def _shown(self, growth: Branching, start: Progress, trail: Trail) -> Branched:
        losses = trail.losses(start.samples, growth.windows, growth.window_samples(start.stage))
        shown = Branched(batch=trail.made[0].plan.batch, losses=losses)
        if growth.goes_by == "training":
            return shown
        return replace(shown, validation=self._evaluator.validation(trail.end, *growth.validates()))

    # ── events ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def _log_branch(self, start: Progress, trails: Sequence[Trail], result: Branched) -> None:
        """Log that a branch has ended, so that a resumed run knows of its evaluations."""
        place = self._place(start, trails)
        evaluated = place["sfo"] - start.ledger.total
        event = Branch(**place, batch=result.batch, lr=trails[-1].made[0].plan.lr, evaluations=evaluated)
        self._events.log(event)

    def _place(self, start: Progress, trails: Sequence[Trail]) -> Place:
        """Return the place of an event within a test: where it began, with all that branches have evaluated."""
        return {**self._events.place(start), "sfo": start.ledger.total + _evaluated(start, trails)}

    def _log(
        self,
        growth: Branching,
        start: Progress,
        trails: Sequence[Trail],
        results: Sequence[Branched],
        verdict: Verdict,
        spent: Ledger,
        seconds: float,
    ) -> None:
        """Log all that the verdict follows from."""
        at = charge(start, spent)
        refused = trails[verdict.winner].end.ledger.discarded - start.ledger.discarded  # by memory
        event = BranchTest(
            **{**self._events.place(at), "sfo": at.ledger.total + refused},
            epoch=start.samples / self._controller.epoch,
            goes_by=growth.goes_by,
            window=growth.window_samples(start.stage),
            batches=[result.batch for result in results],
            lrs=[trail.made[0].plan.lr for trail in trails],
            losses=[[finite(loss) for loss in result.losses] for result in results],
            validation=[finite(result.validation) for result in results] if growth.goes_by == "validation" else None,
            differences=[finite(difference) for difference in verdict.differences],
            errors=[finite(error) for error in verdict.errors],
            winner=verdict.winner,
            batch=results[verdict.winner].batch,
            evaluations=spent.probe,
            sfo_probe=at.ledger.probe,
            seconds=seconds,
            more=dict(growth.limits()),
        )
        self._events.log(event)


def _told(
    growth: Branching, start: Progress, trails: Sequence[Trail], winner: int, spent: Ledger, run: RunLoop
) -> Progress:
    """Log the winner's updates as the run's. Return its end, charged with what the others evaluated."""
    for made in trails[winner].made:
        before, after = charge(made.before, spent), charge(made.after, spent)
        run.announce(before, made.plan)
        run.tell(before, after, made.plan, made.outcome, made.seconds)
    end = replace(charge(trails[winner].end, spent), micro_limit=trails[-1].end.micro_limit)
    return end.with_policy(growth.after_test(start, end))


def _evaluated(start: Progress, trails: Sequence[Trail]) -> int:
    """Return the gradient evaluations of branches that began at `start`."""
    return sum(trail.end.ledger.total - start.ledger.total for trail in trails)


def _given_up(start: Progress, trails: Sequence[Trail]) -> Progress:
    """Return the progress where a test began, whose evaluations are discarded."""
    ledger = replace(start.ledger, discarded=start.ledger.discarded + _evaluated(start, trails))
    return replace(start, ledger=ledger, micro_limit=trails[-1].end.micro_limit)
