"""Ladders that measurements move, and those moved by the gradient's norm or by the progress test; pure frozen specs."""

import math
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from distgrow.core.lr import LR, Factor, Rule, Span
from distgrow.core.lr import Constant as ConstantRule
from distgrow.core.progress import Progress
from distgrow.core.spec import PosFloat, PosInt
from distgrow.core.stages import Dwell, Listed, Stages, Trigger
from distgrow.growth.base import Geometrical, Moment
from distgrow.theory.staged import critical_threshold, published_threshold


class Adaptive(Geometrical):
    """A ladder b₀·δ^m up to a cap that measurements move; it only ever climbs."""

    sets_stages: ClassVar[bool] = True

    @property
    def adaptive(self) -> bool:
        return True

    def boundaries(self, stages: Stages, lr: LR, span: Span) -> Trigger:
        self.needs_cap("could grow without end")
        return super().boundaries(stages, lr, span)

    def soonest(self, dwell: Dwell, span: Span, rungs: int = 1) -> Trigger:
        """Where stages can end at the soonest if every move climbs up to `rungs` and waits for `dwell`.

        A move of fewer rungs may get to a stage sooner, as `dwell` lasts fewer samples where batches are small.
        """
        begins = [0]
        for stage in range(1, int(self.cap_stage) + 1):
            below = range(stage - rungs, stage) if stage > rungs else (0,)  # none is left before stage 0 is
            begins.append(min(begins[m] + dwell.least(self(m), span.epoch) for m in below))
        return Listed(axis="samples", ends=tuple(begins[1:]))


class Endless(Adaptive):
    """An adaptive ladder whose stages go on beyond the cap, where the learning rate decays instead."""

    decay_power: ClassVar[float]  #: η falls by δ^power for each δ that the batch could not grow by

    @property
    def top(self) -> float:
        """A learning rate below 1e-12 of the cap's moves nothing any more."""
        return self.cap_stage + math.ceil(12 / (self.decay_power * math.log10(self.factor)))

    def remarks(self) -> list[str]:
        fall = self.factor**-self.decay_power
        return [f"at the cap lr falls to {fall:.3g} of itself wherever the batch would have grown, which is not shown"]

    def shortfall(self, stage: int) -> float:
        """η's multiplier for what the cap has kept the batch from: (cap/(b₀δ^m))^power, 1 below the cap."""
        return self.factor ** (self.decay_power * (self.height(stage) - stage))

    def multiplier(self, lr: LR, progress: Progress, batch: int, span: Span) -> float:
        return super().multiplier(lr, progress, batch, span) * self.shortfall(progress.stage)


class NormThreshold(Adaptive):
    """Every K updates: one rung more where ‖∇f‖ ≤ ε_m (Umeda & Iiduka, arXiv 2508.05302, whose figures are default).

    γ is 1.4 unless lr.rule says else; at the cap the learning rate stays.
    """

    kind: Literal["adaptive"] = "adaptive"
    default_rule: ClassVar[Rule] = Factor(factor=1.4)
    start: PosInt = 8
    """b₀, samples in the first stage's global batch."""
    cap: PosInt | None = 4096
    """Largest global batch."""
    epsilon: PosFloat = 0.5
    """ε₀, the ‖∇f‖ at which the first stage ends."""
    threshold: Literal["published", "critical"] = "published"
    """published: ε_m = ε₀√(b₀/b_m). critical: ε_m = ε₀(γ/δ)^(m/2), for which b_m is as critical as b₀ was for ε₀."""
    every: PosInt = 1000
    """K, updates from one comparison to the next."""
    norm: Literal["exact", "estimated"] = "exact"
    """exact: ‖∇f‖ over the whole training set, each time as many gradient evaluations as it has samples.
    estimated: from the noise of gradients already computed, at none."""
    updates: PosInt = 20
    """Updates of a stage whose noise has been measured before an estimated norm is compared, at least."""

    @property
    def measures(self) -> bool:
        return self.norm == "estimated"

    @property
    def probes_norm(self) -> bool:
        return self.norm == "exact"

    def earliest(self, lr: LR, span: Span) -> Trigger:
        return Listed(axis="steps", ends=tuple(self.every * (m + 1) for m in range(int(self.top))))

    @property
    def measures_within(self) -> float:
        return self.every if self.measures else math.inf

    def moves(self, progress: Progress, now: Moment) -> int:
        return int(self._due(progress) and self._norm(progress) <= self.level(progress.stage, now.settings))

    def probe_due(self, progress: Progress) -> bool:
        return self.probes_norm and self._due(progress) and progress.probe_step != progress.step

    def level(self, stage: int, lr: LR) -> float:
        """ε_m."""
        if self.threshold == "published":
            return published_threshold(self.epsilon, self(stage) / self.start)
        return critical_threshold(self.epsilon, self.factor, self.rule(lr).factor_for(self.factor), float(stage))

    def probes(self, updates: int, stage: int) -> int:
        if not self.probes_norm:
            return 0
        return int(min((updates - 1) // self.every, self.top if stage >= self.top else math.inf))

    def _due(self, progress: Progress) -> bool:
        """Whether ‖∇f‖ is compared now; once per K updates, also where the coming one has to be repeated."""
        return progress.stage < self.top and progress.stage_step > 0 and progress.step % self.every == 0

    def _norm(self, progress: Progress) -> float:
        """‖∇f‖ now; 0 where it is lost in noise, NaN where it is not known, or not well enough."""
        if self.norm == "exact":
            known = progress.probe_norm if progress.probe_step == progress.step else None
            return math.nan if known is None else known
        if progress.noise.fresh < self.updates:
            return math.nan
        return math.sqrt(max(0.0, progress.noise.grad_sq.value))


class ProgressTest(Endless):
    """One rung more when updates undo each other: when the mean of ⟨g_{t+1}, u_t⟩ since the last change is ≤ 0 [D].

    After Pflug 1983; u_t is the direction of the update before. At the cap η is divided by δ instead. η is constant
    below it unless lr.rule says else.
    """

    kind: Literal["progress"] = "progress"
    default_rule: ClassVar[Rule] = ConstantRule()
    decay_power: ClassVar[float] = 1.0
    dwell: Dwell = Dwell(epochs=1.0)
    """How long a stage is at least, and how many updates it is judged by."""
    confidence: Annotated[float, Field(ge=0)] = 0.0
    """Standard errors that the mean has to be below 0 by."""
    early: PosFloat | None = None
    """Standard errors below 0 at which a stage need not be as long as `dwell`; none: it always is."""

    @property
    def tests_progress(self) -> bool:
        return True

    def earliest(self, lr: LR, span: Span) -> Trigger:
        return self.soonest(self.dwell if self.early is None else Dwell(updates=self.dwell.updates), span)

    def moves(self, progress: Progress, now: Moment) -> int:
        product, dwell = progress.noise.product, self.dwell
        if progress.stage >= self.top or product.count < dwell.updates:
            return 0
        errors = self.confidence if progress.stage_samples >= dwell.length(now.epoch) else self.early
        return int(errors is not None and product.end(errors) <= 0)
