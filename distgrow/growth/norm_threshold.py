"""Growth whenever the gradient's norm has fallen below the stage's threshold."""

import math
from dataclasses import asdict, dataclass
from typing import ClassVar, Literal

from distgrow.core.lr import LR, Factor, Rule, Span
from distgrow.core.progress import PolicyState, Progress
from distgrow.core.spec import PosFloat, PosInt, by_position
from distgrow.core.stages import Listed, Trigger
from distgrow.growth.adaptive import NormProbing
from distgrow.growth.base import Measure, Moment
from distgrow.theory.staged import critical_threshold, published_threshold


@dataclass(frozen=True, slots=True, kw_only=True)
class Probed:
    """Hold the last exact measurement that the policy asked for."""

    norm: float = 0.0  #: ‖∇f‖
    norm_step: int = -1  #: applied updates when it was measured; -1: it has not been


class NormThreshold(NormProbing):
    """Every K updates: one stage up if ‖∇f‖ ≤ ε_m (Umeda & Iiduka, arXiv 2508.05302, whose figures are default).

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
    def needs(self) -> frozenset[Measure]:
        return frozenset({Measure.NORM if self.norm == "exact" else Measure.NOISE})

    def earliest(self, lr: LR, span: Span) -> Trigger:
        return Listed(axis="steps", ends=tuple(self.every * (m + 1) for m in range(int(self.last_stage))))

    def problems(self, stage: int, world: int, max_micro: int, noise_every: int | None) -> list[str]:
        found = super().problems(stage, world, max_micro, noise_every)
        if self.norm == "estimated" and noise_every is not None and noise_every > self.every:
            found.append(
                f"run.noise.every={noise_every}: noise is measured less often than growth.kind={self.name} goes by it, "
                f"which is every {self.every} updates; lower it to that or raise growth.every"
            )
        return found

    def stages_up(self, progress: Progress, now: Moment) -> int:
        return int(self._due(progress) and self._norm(progress) <= self.level(progress.stage, now.settings))

    def probe_due(self, progress: Progress) -> bool:
        return self.norm == "exact" and self._due(progress) and self._probed_here(progress) is None

    def after_probe(self, progress: Progress, norm: float) -> PolicyState:
        return asdict(Probed(norm=norm, norm_step=progress.step))

    def level(self, stage: int, lr: LR) -> float:
        """Return ε_m."""
        if self.threshold == "published":
            return published_threshold(self.epsilon, self.stage_batch(stage) / self.start)
        return critical_threshold(self.epsilon, self.factor, self.rule(lr).factor_for(self.factor), float(stage))

    def probe_count(self, updates: int, stage: int) -> int:
        if self.norm != "exact":
            return 0
        return int(min((updates - 1) // self.every, self.last_stage if stage >= self.last_stage else math.inf))

    def _due(self, progress: Progress) -> bool:
        """Return whether ‖∇f‖ is compared now: once per K updates, also if the coming one has to be repeated."""
        return progress.stage < self.last_stage and progress.stage_step > 0 and progress.step % self.every == 0

    def _norm(self, progress: Progress) -> float:
        """Return ‖∇f‖ now, 0 if it is lost in noise, or NaN if it is not known, or not well enough."""
        if self.norm == "exact":
            known = self._probed_here(progress)
            return math.nan if known is None else known
        if progress.noise.fresh < self.updates:
            return math.nan
        return math.sqrt(max(0.0, progress.noise.grad_sq.value))

    def _probed_here(self, progress: Progress) -> float | None:
        """Return the exact ‖∇f‖ if it was measured after as many updates as now, else None."""
        probed = Probed(**progress.policy)
        return probed.norm if probed.norm_step == progress.step else None


norm_threshold = by_position(NormThreshold, "start", "cap", "factor")
