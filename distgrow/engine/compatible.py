"""Which growth, optimizer and engine go together, by what each says that it can; importing this loads no torch."""

from distgrow.core.errors import ConfigError
from distgrow.engine.async_spec import Async
from distgrow.engine.spec import EngineSpec
from distgrow.growth.base import GrowthPolicy, Measure
from distgrow.optim import OptimizerSpec


def check_compatible(growth: GrowthPolicy, optimizer: OptimizerSpec, engine: EngineSpec) -> None:
    """Check that growth, optimizer and engine go together.

    Raises:
        ConfigError: Growth goes by what the optimizer's or the engine's updates do not show, or the engine cannot
            make the optimizer's steps.
    """
    engine.check_optimizer(optimizer)
    if isinstance(engine, Async):
        engine.check_growth(growth)
    if growth.plain_sgd and not optimizer.plain_sgd:
        raise ConfigError(
            f"growth.kind={growth.name} holds for SGD without momentum, optimizer.kind={optimizer.summary} is none: "
            "set optimizer.momentum=0, or use growth.kind noise_scale, or critical_batch with kappa"
        )
    if Measure.PRECONDITIONED in growth.needs and (optimizer.preconditioner() is None or not engine.preconditions):
        raise ConfigError(
            "growth.norm=preconditioned goes by the second moments of AdamW as plain torch keeps them, and there are "
            f"none with optimizer.kind={optimizer.summary} and engine.kind={engine.kind}: use optimizer.kind=adamw "
            "with engine.kind=torch, or growth.norm=plain"
        )
    if Measure.PROGRESS in growth.needs and not engine.tests_progress:
        raise ConfigError(
            f"growth.kind={growth.name} holds each gradient against the update before, which engine.kind="
            f"{engine.kind} cannot: use engine.kind=torch, or growth.kind critical_batch"
        )
    if engine.delay:
        _check_delayed(growth, optimizer, engine.delay)


def _check_delayed(growth: GrowthPolicy, optimizer: OptimizerSpec, delay: int) -> None:
    """Check that growth and optimizer go with gradients that are applied `delay` updates late."""
    if Measure.PROGRESS in growth.needs:
        raise ConfigError(
            f"engine.delay={delay} applies gradients late, and growth.kind={growth.name} holds each against the update "
            "before, which is then another one's: set engine.delay=0, or growth.kind noise_scale or critical_batch"
        )
    if optimizer.goes_by_parts:
        raise ConfigError(
            f"engine.delay={delay} applies gradients late, and optimizer.kind={optimizer.name} goes by the "
            "micro-batches of the present one: set engine.delay=0, or optimizer.kind lars or lamb"
        )
