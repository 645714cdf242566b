"""Tell who goes by them the norms of micro-batch gradients, parameter by parameter; knows no engine."""

from collections.abc import Iterable
from typing import Any

from distgrow.core.plan import Plan
from distgrow.distributed.world import World
from distgrow.engine.noise.hooks import MicroBatchNorms
from distgrow.engine.stats import UpdateStats


def tell_parts(
    listeners: Iterable[Any],
    norms: MicroBatchNorms,
    plan: Plan,
    stats: UpdateStats,
    world: World,
    *,
    clipped: float,
    items: bool,
) -> None:
    """Hand the norms over all ranks to `see` of each listener, if this update is measured and has several parts.

    Collective.

    Args:
        listeners: An optimizer that goes by parts, or ParameterNoise.
        norms: What this rank's hooks have seen.
        plan: The update's.
        stats: Means over ranks.
        world: The ranks.
        clipped: What the gradients were multiplied by to be clipped.
        items: Whether the loss is a mean over items.
    """
    parts = round(stats.parts * world.size) if items else plan.parts
    if not plan.window or parts < 2 or stats.measured * world.size < world.size - 0.5:
        return
    squares = norms.totals()
    world.add([squares])
    over = squares / stats.weight if items else squares
    given = {p: square for p, square in zip(norms.parameters, over.unbind(), strict=True) if p.grad is not None}
    for listener in listeners:
        listener.see(given, batch=plan.batch, parts=parts, keep=1 - 1 / plan.window, clipped=clipped)
