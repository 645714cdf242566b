"""A policy of its own file can keep numbers from one update to the next, and no other file knows of them."""

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distgrow.core.budget import Budget
from distgrow.core.errors import ConfigError
from distgrow.core.lr import LR, Span
from distgrow.core.plan import Plan
from distgrow.core.progress import Outcome, PolicyState, Progress
from distgrow.growth.adaptive import Adaptive
from distgrow.growth.base import Measure, Moment
from distgrow.growth.controller import Controller

FACTOR, CAP_STAGE = 2, 4


class Patient(Adaptive):
    """One stage up once the loss has not been below its lowest for `patience` updates."""

    kind: Literal["patient"] = "patient"
    cap: int | None = 8 * FACTOR**CAP_STAGE
    patience: int = 3

    @property
    def needs(self) -> frozenset[Measure]:
        return frozenset({Measure.LOSS})

    def stages_up(self, progress: Progress, now: Moment) -> int:
        return int(progress.stage < self.last_stage and progress.policy.get("waited", 0) >= self.patience)

    def after(self, progress: Progress, plan: Plan, outcome: Outcome) -> PolicyState:
        if not outcome.applied:
            return progress.policy
        lowest, waited = progress.policy.get("lowest", math.inf), progress.policy.get("waited", 0)
        if progress.stage_step == 0:
            waited = 0
        return {"lowest": min(lowest, outcome.loss), "waited": 0 if outcome.loss < lowest else waited + 1}


def run(losses: list[float], *, reread_at: int = -1) -> Iterator[tuple[int, Progress]]:
    """Yield (stage, progress) of every update; the one at `reread_at` begins from what a file would hold."""
    control = Controller(growth=Patient(start=8, patience=3), budget=Budget(steps=len(losses)), epoch=10_000)
    progress = Progress()
    for step, loss in enumerate(losses):
        if step == reread_at:
            progress = Progress.from_dict(json.loads(json.dumps(progress.to_dict())))
        progress = control.advance(progress)
        plan = control.plan(progress)
        yield plan.stage, progress
        progress = control.after(progress, plan, Outcome(loss=loss, applied=not math.isnan(loss)))


def test_it_grows_when_its_own_count_says_so() -> None:
    losses = [1.0, 2.0, 2.0, 2.0, 2.0, 0.5, 2.0, 2.0, 2.0, 2.0]
    assert [stage for stage, _ in run(losses)] == [0, 0, 0, 0, 1, 1, 1, 1, 1, 2]


@given(st.lists(st.floats(0, 1) | st.just(math.nan), min_size=1, max_size=40), st.integers(0, 40))
def test_a_run_that_is_written_down_and_read_again_makes_the_same_decisions(losses: list[float], at: int) -> None:
    assert list(run(losses)) == list(run(losses, reread_at=at))


@pytest.mark.parametrize("batch", [8, 64])
def test_an_update_that_is_not_applied_leaves_the_state(batch: int) -> None:
    before = Progress(policy={"lowest": 0.5, "waited": 2})
    plan = Plan(batch=batch, world=1, micro=batch, accum=1, lr=0.1, stage=0)
    assert Patient().after(before, plan, Outcome(applied=False, loss=0.1)) == before.policy


class Wrong(Patient):
    """A policy whose answers are given."""

    batch: Any = 8
    stages: Any = 0
    rate: Any = 1.0
    state: Any = {}
    wants: Any = frozenset()

    @property
    def needs(self) -> frozenset[Measure]:
        return self.wants

    def stage_batch(self, stage: int) -> int:
        return self.batch

    def stages_up(self, progress: Progress, now: Moment) -> int:
        return self.stages

    def multiplier(self, lr: LR, progress: Progress, batch: int, span: Span) -> float:
        return self.rate

    def after(self, progress: Progress, plan: Plan, outcome: Outcome) -> PolicyState:
        return self.state


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"batch": math.nan}, "stage_batch"), ({"batch": 8.5}, "stage_batch"), ({"batch": 0}, "stage_batch"),
        ({"stages": 0.5}, "stages_up"), ({"stages": -1}, "stages_up"), ({"stages": None}, "stages_up"),
        ({"rate": -1.0}, "multiplier"), ({"rate": math.nan}, "multiplier"), ({"rate": None}, "multiplier"),
        ({"state": {0: 1}}, "after"), ({"state": {"a": (1,)}}, "after"), ({"state": None}, "after"),
        ({"state": {"a": object()}}, "after"),
        ({"wants": frozenset({"bogus"})}, "needs"), ({"wants": frozenset({Measure.NORM})}, "NormProbing"),
    ],
)  # fmt: skip
def test_an_answer_that_cannot_be_is_refused_by_the_name_of_the_policy(wrong: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=rf"Wrong\..*{named}"):
        control = Controller(growth=Wrong(**wrong), budget=Budget(steps=5), epoch=10_000)
        progress = control.advance(replace(Progress(), stage=2))
        control.after(progress, control.plan(progress), Outcome(loss=0.5))


def test_no_stage_is_beyond_the_last() -> None:
    control = Controller(growth=Wrong(start=8, stages=100), budget=Budget(steps=5), epoch=10_000)
    assert control.advance(Progress()).stage == CAP_STAGE
