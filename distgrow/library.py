"""Short names for the specs, for those who write Python instead of YAML; decides nothing."""

from distgrow.lr import LR, Constant, Decay, Factor, Linear, NoDecay, Power, Rule, Sqrt
from distgrow.schedule import Constant as ConstantBatch
from distgrow.schedule import Exponential, Increase, Optimal, Seesaw, Steps
from distgrow.schedule import Linear as LinearBatch
from distgrow.stages import Budget, Every, Stages


def constant(batch: int) -> ConstantBatch:
    """The same batch throughout."""
    return ConstantBatch(start=batch)


def linear(start: int, increment: int, cap: int | None = None) -> LinearBatch:
    """b₀ + c·m, at most `cap` samples."""
    return LinearBatch(start=start, increment=increment, cap=cap)


def exponential(start: int, factor: float = 2.0, cap: int | None = None) -> Exponential:
    """⌈b₀·δ^m⌉, at most `cap` samples."""
    return Exponential(start=start, factor=factor, cap=cap)


def batches(sizes: list[int]) -> Steps:
    """An explicit list, one batch size per stage."""
    return Steps(batches=sizes)


def optimal(start: int, factor: float, cap: int) -> Optimal:
    """Exponential growth with the stage lengths that are optimal for δ, the LR rule's γ and the budget."""
    return Optimal(start=start, factor=factor, cap=cap)


def seesaw(start: int, factor: float = 2.0, cap: int | None = None) -> Seesaw:
    """Where the decay would divide η by δ: η/√δ and b·δ."""
    return Seesaw(start=start, factor=factor, cap=cap)


def increase(start: int, factor: float = 2.0, cap: int | None = None) -> Increase:
    """Where the decay would divide η by δ: b·δ instead."""
    return Increase(start=start, factor=factor, cap=cap)


def every(
    *,
    epochs: float | list[float] | None = None,
    samples: int | list[int] | None = None,
    steps: int | list[int] | None = None,
    power: float = 0.0,
) -> Stages:
    """Stages so many epochs, samples or steps long; each δ^power times as long as the one before."""
    return Stages(every=Every(epochs=epochs, samples=samples, steps=steps), power=power)


def budget(
    *, epochs: float | None = None, samples: int | None = None, steps: int | None = None, sfo: int | None = None
) -> Budget:
    """When the run is over."""
    return Budget(epochs=epochs, samples=samples, steps=steps, sfo=sfo)


def constant_lr(base: float, decay: Decay | None = None) -> LR:
    """η₀, whatever the batch."""
    return _lr(base, Constant(), decay)


def sqrt_lr(base: float, decay: Decay | None = None) -> LR:
    """η₀·√(b/b₀)."""
    return _lr(base, Sqrt(), decay)


def linear_lr(base: float, decay: Decay | None = None) -> LR:
    """η₀·b/b₀."""
    return _lr(base, Linear(), decay)


def power_lr(base: float, power: float, decay: Decay | None = None) -> LR:
    """η₀·(b/b₀)^power."""
    return _lr(base, Power(power=power), decay)


def factor_lr(base: float, factor: float, decay: Decay | None = None) -> LR:
    """η₀·γ^m at stage m."""
    return _lr(base, Factor(factor=factor), decay)


def _lr(base: float, rule: Rule, decay: Decay | None) -> LR:
    return LR(base=base, rule=rule, decay=decay or NoDecay())
