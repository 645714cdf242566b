"""What policies share that try batches by short branches of the run itself, of which one goes on. Pure."""

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

from pydantic import Field, model_validator

from distgrow.core.errors import ConfigError
from distgrow.core.lr import LR, Span
from distgrow.core.progress import Ledger, PolicyState, Progress
from distgrow.core.spec import PosInt
from distgrow.core.stages import Listed, Stages, Trigger
from distgrow.growth.adaptive import Adaptive
from distgrow.growth.base import Measure, needs_samples


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """Hold how a branch begins."""

    stages: int  #: stages above that of the run
    state: PolicyState  #: the policy's own state in the branch


@dataclass(frozen=True, slots=True, kw_only=True)
class Branched:
    """Hold what a branch has shown. It is equal on every rank."""

    batch: int  #: samples of its updates
    losses: tuple[float, ...]  #: mean training loss over each window; NaN from an update on that was not finite
    validation: float = math.nan  #: loss of the evaluation set at its end, if the policy goes by that


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Hold which branch goes on, and why: the difference of each to the first, with its standard error."""

    winner: int
    differences: tuple[float, ...]
    errors: tuple[float, ...]


class Branching(Adaptive):
    """Adaptive growth that is decided by branches of equal samples from the same state.

    The winner's end is the run's. The others are measurements: their evaluations are charged to `probe`. A test begins
    once all tests so far and this one cost at most `cost` of the samples that the run has applied. So tests never cost
    more than that share of the run. The batch never falls.
    """

    goes_by: ClassVar[str] = "training"  #: whose loss decides: that of training or validation
    factor: Annotated[int, Field(ge=2, le=1024)] = 2  # pyright: ignore[reportIncompatibleVariableOverride]
    """k, the batch's factor at each stage: a whole number, so that batches end at the same samples."""
    cap: PosInt | None = None
    """Largest global batch, start·kᵐ; none: the largest one that is at most a quarter of the training set and whose
    test is within `cost`."""
    cost: Annotated[float, Field(gt=0, le=1)] = 0.1
    """Share of the run's samples that branches may cost beside those that go on."""
    tests: PosInt = 12
    """Tests that share this cost, at most, unless `samples` says how long branches are."""
    samples: PosInt | None = None
    """Samples of a branch, about; none: as many as `tests` leave. It has `windows` updates at least."""
    windows: Annotated[int, Field(ge=4, le=4096)] = 16
    """Parts of equal samples that a branch's loss is averaged over; a part has one update at least."""

    @model_validator(mode="after")
    def _cap_is_a_stage(self) -> "Branching":
        if self.cap is not None and self.start * self.factor**self.cap_stage != self.cap:
            below = self.start * self.factor ** (int(self.cap_stage) - 1)
            raise ConfigError(
                f"cap={self.cap} is not start={self.start} times a power of factor={self.factor}, as branches have to "
                f"end at the same sample: give cap={below} or {below * self.factor}"
            )
        return self

    # ── what a policy gives ─────────────────────────────────────────────────────────────────────────────────────────

    @property
    @abstractmethod
    def losers(self) -> int:
        """Return the number of branches of a test that do not go on, at most."""

    @abstractmethod
    def candidates(self, progress: Progress) -> tuple[Candidate, ...]:
        """Return how the branches of a test begin; the first is the run as it is."""

    @abstractmethod
    def verdict(self, results: Sequence[Branched]) -> Verdict:
        """Return which branch goes on."""

    def validates(self) -> tuple[str | None, str]:
        """Return the name of the test set whose loss decides, if there are several, and of its metric."""
        return None, "loss"

    def limits(self) -> Mapping[str, float]:
        """Return the settings that a verdict follows from, for whoever checks one."""
        return {}

    @property
    def ahead(self) -> int:
        """Return the stages of the largest branch above the run's own."""
        return 1

    # ── what they share ─────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def needs(self) -> frozenset[Measure]:
        return frozenset({Measure.LOSS})

    def for_run(self, span: Span) -> "Branching":
        """Return the policy with a cap and with the length of a branch.

        Raises:
            ConfigError: The budget does not hold one test.
        """
        if not span.samples:
            return self
        least, share = self.losers * self.windows * self.start, self.cost * span.samples
        powers = 0
        while least * self.factor ** (powers + 1) <= share:
            powers += 1
        if powers == 0:
            raise ConfigError(
                f"growth.kind={self.name}: a test takes at least {least * self.factor:,} gradient evaluations, more "
                f"than growth.cost={self.cost:g} of the budget of {span.samples:,} samples; raise budget or "
                "growth.cost, or lower growth.windows or growth.start"
            )
        quarter = int(math.log(max(1.0, span.epoch / 4 / self.start), self.factor) + 1e-9)
        cap = self.cap or self.start * self.factor ** max(0, min(powers, quarter))
        samples = self.samples or max(1, int(share / (self.tests * self.losers)))
        return type(self).model_validate({**self.model_dump(), "cap": cap, "samples": samples})

    def trigger(self, stages: Stages, lr: LR, span: Span) -> Trigger:
        needs_samples(f"growth.kind={self.name}", span)
        return super().trigger(stages, lr, span)

    def earliest(self, lr: LR, span: Span) -> Trigger:
        """Return the soonest ends: each test is won by the largest batch that brings the next test soonest."""
        spent, begins = [0], [0]
        for stage in range(1, int(self.last_stage) + 1):
            below = range(max(0, stage - self.ahead), stage)
            spent.append(min(spent[m] + self.test_cost(m) for m in below))
            after = min(begins[m] + self._least_branch(m) for m in below)
            begins.append(max(begins[-1], after, math.ceil(spent[-1] / self.cost)))
        return Listed(axis="samples", ends=tuple(begins[1:]))

    def _least_branch(self, stage: int) -> int:
        """Return the samples of the shortest branch that can have brought the run to `stage`; 0 for the first."""
        return min((self.branch_samples(m) for m in range(max(0, stage - self.ahead), stage)), default=0)

    def window_samples(self, stage: int) -> int:
        """Return the samples of a window of a test at `stage`, a multiple of every batch that is tried."""
        largest = self.stage_batch(int(min(stage + self.ahead, self.last_stage)))
        return largest * max(1, (self.samples or 0) // (self.windows * largest))

    def branch_samples(self, stage: int) -> int:
        """Return the samples of each branch of a test at `stage`."""
        return self.windows * self.window_samples(stage)

    def test_cost(self, stage: int) -> int:
        """Return the gradient evaluations that a test at `stage` may cost."""
        return self.losers * self.branch_samples(stage)

    def most_spent(self, samples: int) -> int:
        """Return the gradient evaluations that all tests of a run of so many samples cost, at most."""
        return int(self.cost * samples)

    def affordable(self, progress: Progress) -> bool:
        """Return whether the batch can grow, and all tests with one here cost at most their share."""
        if progress.stage >= self.last_stage:
            return False
        spent = progress.policy.get("spent", 0) + self.test_cost(progress.stage)
        return spent <= self.cost * progress.ledger.applied

    def after_test(self, start: Progress, end: Progress) -> PolicyState:
        """Return the policy's state at the winner's end of a test that began at `start`."""
        return {**end.policy, "spent": start.policy.get("spent", 0) + self.test_cost(start.stage)}


def window_difference(first: Branched, other: Branched, skip: int) -> tuple[float, float]:
    """Return the mean difference of two branches' losses by windows, and its standard error.

    Both branches see the same samples in a window, so what these samples are like cancels.

    Args:
        first: The branch that is subtracted.
        other: The branch that it is subtracted from.
        skip: First windows that do not count.
    """
    differences = [b - a for a, b in zip(first.losses[skip:], other.losses[skip:], strict=True)]
    count = len(differences)
    mean = math.fsum(differences) / count
    spread = math.fsum((difference - mean) ** 2 for difference in differences) / (count - 1)
    return mean, math.sqrt(spread / count)


def no_worse(difference: float, error: float, *, tolerance: float, confidence: float) -> bool:
    """Return whether a loss is no worse than another: the upper end of the difference is at most `tolerance`.

    A difference that is not finite never is.
    """
    return math.isfinite(difference) and difference + confidence * error <= tolerance


def largest_no_worse(losses: Mapping[int, float], tolerance: float) -> int:
    """Return the largest k whose loss exceeds that of no smaller k by more than `tolerance`.

    Losses that are NaN or inf are never good enough.
    """
    best, critical = math.inf, min(losses)
    for k in sorted(losses):
        if math.isfinite(losses[k]):
            critical = k if losses[k] <= best + tolerance else critical
            best = min(best, losses[k])
    return critical


def spent_by_others(start: Progress, ends: Sequence[Progress], winner: int) -> Ledger:
    """Return what the branches that do not go on have evaluated, as the ledger counts it: probe and discarded.

    Args:
        start: Where all branches began.
        ends: Where they ended.
        winner: The number of the one that goes on.
    """
    before, lost = start.ledger, [end.ledger for number, end in enumerate(ends) if number != winner]
    return Ledger(
        probe=sum(ledger.first_time - before.first_time for ledger in lost),
        discarded=sum(ledger.discarded - before.discarded for ledger in lost),
    )


def charge(progress: Progress, spent: Ledger) -> Progress:
    """Return the progress of the winner, charged with what the other branches have evaluated."""
    ledger = progress.ledger
    probe, discarded = ledger.probe + spent.probe, ledger.discarded + spent.discarded
    return replace(progress, ledger=replace(ledger, probe=probe, discarded=discarded))
