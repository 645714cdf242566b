"""Growth that matches the batch to a shape of η: the temperature η/b falls along a line to the end of the budget."""

import math
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from distgrow.core.errors import ConfigError
from distgrow.core.lr import LR, WSD, Cosine, Rule, Span
from distgrow.core.lr import Constant as ConstantRule
from distgrow.core.progress import Progress
from distgrow.core.spec import PosInt, at_least, by_position
from distgrow.core.stages import Listed, Stages, Trigger
from distgrow.growth.base import needs_samples
from distgrow.growth.objective import Aimed
from distgrow.theory.last_iterate import line, share_at

#: Searches for a place skip this part of what is left, at least, so that they end; no place is missed by more.
FINENESS = 4096


class Matched(Aimed):
    """b ∝ η/√S, S the learning rates still to come: η/b falls along a straight line, whatever shape lr.decay gives η.

    The line begins at the end of the warm-up, or at `hold` if that is later, and is 0 at the end of the budget. The
    batch is one of b₀·δ^m and never falls. At the cap η falls along the line, if lr.decay has not brought it lower.
    Derived for this project, after the bound of the last iterate in arXiv 2607.27731.
    """

    kind: Literal["matched"] = "matched"
    sets_stages: ClassVar[bool] = True
    brings_rule: ClassVar[bool] = True
    default_rule: ClassVar[Rule] = ConstantRule()
    cap: PosInt | None = None
    """Largest global batch; none: a quarter of the training set, or √(start·N) with N the budget if that is less."""
    hold: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Part of the budget at which η/b begins to fall."""

    @property
    def held(self) -> str:
        return (
            "lr.decay lowers η about as fast as growth.kind=matched lowers η/b: nothing is left for the batch; let "
            "lr.decay begin later, or lower growth.hold or growth.factor"
        )

    def for_run(self, span: Span) -> "Matched":
        """Return the policy with a cap that suits the run, if none is given: the last batch is about √(b₀·N)."""
        if self.cap is not None:
            return self
        most = min(span.epoch // 4, math.isqrt(self.start * span.samples))
        return Matched.model_validate({**self.model_dump(), "cap": max(self.start, most)})

    def trigger(self, stages: Stages, lr: LR, span: Span) -> Trigger:
        needs_samples("growth.kind=matched", span)
        self.needs_cap("grows to the cap at most")
        if self.begin(lr) >= 1:
            raise ConfigError(
                "growth.kind=matched: lr.decay is a warm-up over all of the budget; lower lr.decay.warmup"
            )
        ends: list[int] = []
        for stage in range(int(self.last_stage)):
            end = self._end(stage, lr, span, after=ends[-1] if ends else 0)
            if end is None:
                break
            ends.append(end)
        return Listed(axis="samples", ends=tuple(ends))

    def begin(self, lr: LR) -> float:
        """Return the part of the budget at which the line begins."""
        return max(self.hold, lr.decay.warmup if isinstance(lr.decay, Cosine | WSD) else 0.0)

    def multiplier(self, lr: LR, progress: Progress, batch: int, span: Span) -> float:
        """Return η/η₀: that of lr.decay, but at most what the cap leaves of the line."""
        samples = progress.ledger.applied
        left = (self.cap or math.inf) / self.start * line(samples / span.samples, self.begin(lr))
        return lr.decay.warm(samples, batch, span) * min(lr.decay.fall(samples, span), left)

    def rate_growth(self, lr: LR, progress: Progress, batch: int) -> float:
        return 1.0

    def _end(self, stage: int, lr: LR, span: Span, after: int) -> int | None:
        """Return the first sample from `after` on at which η/line is half-way, by ratio, to the next batch.

        η never rises, so the place for the η at a sample is a lower bound of the place for every later η.
        """
        steps = (self.growth_steps(stage) + self.growth_steps(stage + 1)) / 2
        colder, begin = self.factor**-steps, self.begin(lr)
        while after < span.samples:
            end = at_least(share_at(colder * lr.decay.fall(after, span), begin) * span.samples)
            if end <= after:
                return after
            after = max(end, after + (span.samples - after) // FINENESS)
        return None


matched = by_position(Matched, "start", "cap", "factor", "hold")
