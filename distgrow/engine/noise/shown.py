"""What an applied update has shown of its gradient's noise, over all ranks; knows no engine."""

import math

from distgrow.core.noise_stats import Measured
from distgrow.core.plan import Plan
from distgrow.distributed.world import World
from distgrow.engine.stats import UpdateStats


def shown_noise(
    plan: Plan,
    stats: UpdateStats,
    products: tuple[float, float],
    world: World,
    *,
    grad_norm: float,
    metric_sq: float | None,
    sharded: bool,
    stepped: bool,
    items: bool,
) -> Measured:
    """Return the squared norms and the product of the progress test that `plan` asks for. Collective.

    Args:
        plan: The update's.
        stats: Means over ranks.
        products: See StepProducts.results.
        world: The ranks.
        grad_norm: Norm of the mean gradient, before clipping.
        metric_sq: |g|² in the metric of the step; None: it is not known.
        sharded: Whether a rank's optimizer sees its shards of the gradient alone.
        stepped: Whether the step was looked at, and `products` are those of this rank's shards alone.
        items: Whether the loss is a mean over items.
    """
    penalty, product = products
    square, size = grad_norm * grad_norm, world.size
    if plan.preconditioned:
        square = math.nan if metric_sq is None else metric_sq
    if not sharded:
        penalty, product, square = world.mean_async([penalty, product, square])()
    elif stepped:
        penalty, product = world.sum([penalty, product])
    micro_sq = float(stats.micro_sq) * size if stats.measured * size > size - 0.5 else math.nan
    batch_sq = square + penalty if plan.window else math.nan
    parts = round(stats.parts * size) if items else 0
    return Measured(parts_sq=micro_sq + penalty, batch_sq=batch_sq, product=product, parts=parts)
