"""Short names for the specs, for those who write Python instead of YAML; decides nothing."""

from typing import Literal

from distgrow.core.budget import Budget
from distgrow.core.lr import LR, Constant, Decay, Factor, Linear, NoDecay, Power, Rule, Sqrt
from distgrow.core.stages import Dwell, Every, Stages
from distgrow.growth.adascale import AdaScale
from distgrow.growth.auto import Auto
from distgrow.growth.cabs import CABS
from distgrow.growth.constant import Constant as ConstantBatch
from distgrow.growth.critical_batch import Tracking
from distgrow.growth.exponential import Exponential
from distgrow.growth.increase import Increase
from distgrow.growth.late import Late
from distgrow.growth.linear import Linear as LinearBatch
from distgrow.growth.noise_scale import NoiseScale
from distgrow.growth.norm_threshold import NormThreshold
from distgrow.growth.optimal import Optimal
from distgrow.growth.progress_test import ProgressTest
from distgrow.growth.scheduled import Plain
from distgrow.growth.seesaw import Seesaw
from distgrow.growth.steps import Steps
from distgrow.growth.tau_nice import TauNice
from distgrow.growth.temperature import Plateau, Temperature


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


def auto(start: int = 16, cap: int | None = None) -> Auto:
    """The default: b₀ for a while, then colder along a line to the end of the budget, or faster once it has settled."""
    return Auto(start=start, cap=cap)


def late(start: int, cap: int, factor: float = 2.0, hold: float = 0.75) -> Late:
    """b₀ for the fraction `hold` of the budget, then growth to the cap in equal stages."""
    return Late(start=start, cap=cap, factor=factor, hold=hold)


def norm_threshold(
    start: int = 8,
    cap: int = 4096,
    factor: float = 2.0,
    *,
    epsilon: float = 0.5,
    every: int = 1000,
    norm: Literal["exact", "estimated"] = "exact",
    threshold: Literal["published", "critical"] = "published",
) -> NormThreshold:
    """One rung more where, every so many updates, ‖∇f‖ is at most the stage's threshold."""
    return NormThreshold(
        start=start, cap=cap, factor=factor, epsilon=epsilon, every=every, norm=norm, threshold=threshold
    )


def progress_test(start: int, cap: int, factor: float = 2.0, *, dwell: Dwell | None = None) -> ProgressTest:
    """One rung more where updates undo each other; at the cap η/δ."""
    return ProgressTest(start=start, cap=cap, factor=factor, dwell=dwell or Dwell(epochs=1.0))


def critical_batch_tracking(
    start: int,
    cap: int,
    factor: float = 2.0,
    *,
    kappa: float | None = None,
    smoothness: float | None = None,
    dwell: Dwell | None = None,
) -> Tracking:
    """b follows κ·tr Σ/|∇f|², κ given or from L and the learning rate; at the cap η falls instead."""
    dwell = dwell or Dwell(epochs=0.1, updates=10)
    return Tracking(start=start, cap=cap, factor=factor, kappa=kappa, smoothness=smoothness, dwell=dwell)


def noise_scale_tracking(start: int, cap: int, factor: float = 2.0, *, share: float = 1.0) -> NoiseScale:
    """b follows `share` of the noise scale tr Σ/|∇f|²."""
    return NoiseScale(start=start, cap=cap, factor=factor, share=share)


def cabs(start: int, cap: int, factor: float = 2.0) -> CABS:
    """b follows η·tr Σ/f."""
    return CABS(start=start, cap=cap, factor=factor)


def at_temperature(
    start: int,
    cap: int,
    factor: float = 2.0,
    *,
    power: float = 1.0,
    lr_max: float | None = None,
    share: float | None = None,
    gain: bool = False,
    plateau: Plateau | None = None,
) -> Temperature:
    """η/b^p falls along the decay or at plateaus; the batch is as large as `lr_max`, `share` and the cap allow."""
    return Temperature(
        start=start, cap=cap, factor=factor, power=power, lr_max=lr_max, share=share, gain=gain, plateau=plateau
    )


def adascale(start: int, *, scale: int | None = None, ladder: Plain | None = None, power: float = 1.0) -> AdaScale:
    """A batch of scale·b₀ or of a plain ladder, whose learning rate is AdaScale's gain times that of b₀."""
    return AdaScale(start=start, scale=scale, ladder=ladder, power=power)


def tau_nice_batch(
    samples: int, *, smoothness: float, largest_smoothness: float, mu: float, optimum_sq: float, epsilon: float
) -> TauNice:
    """The best constant batch of SGD on a strongly convex finite sum of known constants."""
    return TauNice(
        samples=samples,
        smoothness=smoothness,
        largest_smoothness=largest_smoothness,
        mu=mu,
        optimum_sq=optimum_sq,
        epsilon=epsilon,
    )


def dwell(*, epochs: float | None = None, samples: int | None = None, updates: int = 20) -> Dwell:
    """How long adaptive growth stays on a rung at least."""
    return Dwell(epochs=epochs, samples=samples, updates=updates)


def plateau(
    *, epochs: float | None = None, samples: int | None = None, fall: float = 0.01, updates: int = 20
) -> Plateau:
    """Where the training loss falls by less than the share `fall` over so many epochs or samples."""
    return Plateau(epochs=epochs, samples=samples, fall=fall, updates=updates)


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
