"""Growth whenever the gradient's norm has fallen below the stage's threshold."""

import math
from typing import ClassVar, Literal

from distgrow.core.lr import LR, Factor, Rule, Span
from distgrow.core.progress import Progress
from distgrow.core.spec import PosFloat, PosInt, by_position
from distgrow.core.stages import Listed, Trigger
from distgrow.growth.base import Adaptive, Moment
from distgrow.theory.staged import critical_threshold, published_threshold


class NormThreshold(Adaptive):
    """Every K updates: one rung more where ‖∇f‖ ≤ ε_m (Umeda & Iiduka, arXiv 2508.05302, whose figures are default).

    γ is 1.4 unless lr.rule says else; at the cap the learning rate stays.
    """

    kind: Literal["norm_threshold"] = "norm_threshold"
    old_kinds: ClassVar[tuple[str, ...]] = ("adaptive",)
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


norm_threshold = by_position(NormThreshold, "start", "cap", "factor")
