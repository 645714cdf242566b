"""What an optimizer's settings follow from at an update, by the policy and the progress. Pure."""

from distgrow.core.lr import LR
from distgrow.core.optimizer_plan import AtGrowth, OptimizerPlan
from distgrow.core.progress import Progress
from distgrow.growth.answers import checked_batch
from distgrow.growth.base import GrowthPolicy


def optimizer_plan(
    spec: AtGrowth, growth: GrowthPolicy, lr: LR, progress: Progress, batch: int
) -> OptimizerPlan | None:
    """Return what the settings follow from at an update of `batch` samples, or None if they follow nothing."""
    if not spec.changes:
        return None
    first, applied = growth.first_batch, progress.ledger.applied
    return OptimizerPlan(
        spec=spec,
        ratio=batch / first,
        decay=batch / first / growth.rate_growth(lr, progress, batch),
        step=progress.step,
        samples=applied / first,
        moment_step=progress.step - progress.grown_step,
        moment_samples=(applied - progress.grown_samples) / first,
    )


def marked(spec: AtGrowth, growth: GrowthPolicy, before: Progress, after: Progress) -> Progress:
    """Return `after`, which notes that its stage has another batch than that of `before`, if the optimizer asks."""
    if spec.moments == "keep" or checked_batch(growth, before.stage) == checked_batch(growth, after.stage):
        return after
    return after.at_another_batch()
