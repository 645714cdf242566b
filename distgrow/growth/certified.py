"""Growth wherever a branch with a larger batch is no worse at equal samples (Merrill et al. 2025)."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

from pydantic import Field

from distgrow.core.errors import ConfigError
from distgrow.core.lr import LR, Grown, Span
from distgrow.core.lr import Constant as ConstantRule
from distgrow.core.progress import Progress
from distgrow.core.spec import by_position
from distgrow.core.stages import Stages, Trigger
from distgrow.growth.branching import Branched, Branching, Candidate, Verdict, no_worse, window_difference


class Certified(Branching):
    """One stage up where a branch at k·b is no worse than one at b on the same samples (after arXiv 2505.23971).

    Branches are (b, η), then (k·b, η) and (k·b, f(k)·η), f from lr.rule. No worse means: the mean difference of their
    training losses by windows of the same samples, plus `confidence` standard errors, is at most `tolerance`.
    """

    kind: Literal["certified"] = "certified"
    rates: Literal["scaled", "kept", "both"] = "scaled"
    """Learning rates that the larger batch is tried at: f(k)·η, η, or both, of which f(k)·η goes on if no worse."""
    tolerance: Annotated[float, Field(ge=0)] = 0.01
    """Training loss that the larger batch may be worse by."""
    confidence: Annotated[float, Field(ge=0)] = 2.0
    """Standard errors by which the difference has to be below `tolerance`; 0: the mean alone."""

    @property
    def losers(self) -> int:
        return 2 if self.rates == "both" else 1

    @property
    def held(self) -> str:
        return f"growth.kind={self.name} finds no room for a test in the budget, or at growth.cap; raise them"

    @property
    def skip(self) -> int:
        """Return the first windows of a branch that do not count: a quarter, in which it settles."""
        return self.windows // 4

    def trigger(self, stages: Stages, lr: LR, span: Span) -> Trigger:
        if self.rates != "kept" and isinstance(self.rule(lr), ConstantRule):
            raise ConfigError(
                f"growth.rates={self.rates} tries the larger batch at f(k)·η, which lr.rule.kind=constant makes η: set "
                "growth.rates=kept, or another lr.rule"
            )
        return super().trigger(stages, lr, span)

    def candidates(self, progress: Progress) -> tuple[Candidate, ...]:
        state, followed = dict(progress.policy), progress.policy.get("followed", 0)
        kept = Candidate(stages=1, state=state)
        scaled = Candidate(stages=1, state={**state, "followed": followed + 1})
        grown = {"kept": (kept,), "scaled": (scaled,), "both": (kept, scaled)}[self.rates]
        return (Candidate(stages=0, state=state), *grown)

    def verdict(self, results: Sequence[Branched]) -> Verdict:
        """Return the last branch that is no worse than the first; that at f(k)·η is the last."""
        pairs = [window_difference(results[0], result, self.skip) for result in results]
        limits = {"tolerance": self.tolerance, "confidence": self.confidence}
        passed = [number for number, pair in enumerate(pairs) if number and no_worse(*pair, **limits)]
        differences, errors = zip(*pairs, strict=True)
        return Verdict(winner=max(passed, default=0), differences=differences, errors=errors)

    def limits(self) -> Mapping[str, float]:
        return {"tolerance": self.tolerance, "confidence": self.confidence, "skip": self.skip}

    def multiplier(self, lr: LR, progress: Progress, batch: int, span: Span) -> float:
        samples = progress.ledger.applied
        return (
            self.rate_growth(lr, progress, batch) * lr.decay.warm(samples, batch, span) * lr.decay.fall(samples, span)
        )

    def rate_growth(self, lr: LR, progress: Progress, batch: int) -> float:
        """Return the factor of η by which it has followed the batch where a scaled branch has won."""
        followed, stage_batch = progress.policy.get("followed", 0), self.stage_batch(progress.stage)
        ratio = self.factor**followed * min(batch, stage_batch) / stage_batch  # of a last batch that is cut short, too
        return self.rule(lr)(Grown(ratio=ratio, steps=float(followed)))

    def highest_rate(self, lr: LR, stage: int, rate: float) -> float:
        return rate if self.rates == "kept" else rate * max(1.0, self.rule(lr).factor_for(self.factor) ** stage)


certified = by_position(Certified, "start", "cap", "factor")
