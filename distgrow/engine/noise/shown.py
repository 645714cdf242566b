"""What an applied update has shown of its gradient's noise, over all ranks; knows no engine."""

import math

from distgrow.core.noise_stats import Measured
from distgrow.core.plan import Plan
from distgrow.distributed.world import World
from distgrow.engine.noise.hooks import StepProducts
from distgrow.engine.stats import UpdateStats


def shown_noise(
    plan: Plan,
    stats: UpdateStats,
    products: StepProducts,
    world: World,
    *,
    grad_norm: float,
    metric_sq: float | None,
    sharded: bool,
    items: bool,
) -> Measured:
    """Return the squared norms and the product of the progress test that `plan` asks for. Collective.

    Args:
        plan: The update's.
        stats: Means over ranks.
        products: What was seen of the step.
        world: The ranks.
        grad_norm: Norm of the mean gradient, before clipping.
        metric_sq: |g|² in the metric of the step; None: it is not known.
        sharded: Whether a rank's optimizer sees its shards of the gradient alone.
        items: Whether the loss is a mean over items.
    """
    if not (plan.window or plan.product):
        return Measured()
    penalty, product = products.results(grad_norm)
    square, size = grad_norm * grad_norm, world.size
    if plan.preconditioned:
        square = math.nan if metric_sq is None else metric_sq
    if not sharded:
        penalty, product, square = world.mean_async([penalty, product, square])()
    elif products.wanted:
        penalty, product = world.sum([penalty, product])
    micro_sq = float(stats.micro_sq) * size if stats.measured * size > size - 0.5 else math.nan
    batch_sq = square + penalty if plan.window else math.nan
    parts = round(stats.parts * size) if items else 0
    return Measured(parts_sq=micro_sq + penalty, batch_sq=batch_sq, product=product, parts=parts)
