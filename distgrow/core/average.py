"""Averages of the parameters along the samples: how much an update's parameters weigh in them. Pure arithmetic."""

import math
from abc import ABC, abstractmethod
from typing import Annotated, Literal

from pydantic import Field, model_validator

from distgrow.core.lr import Span
from distgrow.core.spec import PosFloat, PosInt, Spec, one_of


class Horizon(Spec):
    """How far an average remembers: exactly one of the three."""

    samples: PosInt | None = None
    """Samples."""
    epochs: PosFloat | None = None
    """Epochs."""
    fraction: Annotated[float, Field(gt=0, le=1)] | None = None
    """Fraction of the budget's samples."""

    @model_validator(mode="after")
    def _one_unit(self) -> "Horizon":
        one_of(self, "samples", "epochs", "fraction")
        return self

    def of(self, span: Span) -> float:
        """Return the horizon in samples."""
        return self.samples or (self.epochs or 0) * span.epoch or (self.fraction or 0) * span.samples


class AverageSpec(Spec, ABC):
    """Say how the parameters are averaged. An update counts by its samples, whatever the batch."""

    @abstractmethod
    def weight(self, samples: int, batch: int, span: Span) -> float:
        """Return α of ā ← ā + α(θ − ā) for the parameters θ after an update.

        Args:
            samples: Samples applied before the update.
            batch: Samples of the update.
            span: The run's samples axis.

        Returns:
            α in [0, 1]. 0: θ is not taken in. 1: the average begins with θ.
        """


class EMA(AverageSpec):
    """The exponential moving average: θ of h samples ago weighs exp(−1) times as much as θ now.

    Weights are divided by their sum, so that the average does not begin at the initial parameters.
    """

    kind: Literal["ema"] = "ema"
    horizon: Horizon = Horizon(fraction=0.05)
    """h. The decay of an update of b samples is exp(−b/h)."""

    def weight(self, samples: int, batch: int, span: Span) -> float:
        """Return (1 − exp(−b/h)) / (1 − exp(−s/h)), with s the samples up to and with this update."""
        horizon = self.horizon.of(span)
        return math.expm1(-batch / horizon) / math.expm1(-(samples + batch) / horizon)


class Tail(AverageSpec):
    """The plain mean over the last part of the budget (stochastic weight averaging, Izmailov et al. 2018)."""

    kind: Literal["tail"] = "tail"
    fraction: Annotated[float, Field(gt=0, le=1)] = 0.25
    """Fraction of the budget's samples, its last, that is averaged over."""

    def weight(self, samples: int, batch: int, span: Span) -> float:
        """Return the update's share of the samples since the tail began."""
        since = samples + batch - (1 - self.fraction) * span.samples
        return min(batch, since) / since if since > 0 else 0.0


Average = Annotated[EMA | Tail, Field(discriminator="kind")]


def ema(*, samples: int | None = None, epochs: float | None = None, fraction: float | None = None) -> EMA:
    """Return the exponential moving average of a horizon in one of the units; without one it is 0.05 of the budget."""
    if samples is epochs is fraction is None:
        return EMA()
    return EMA(horizon=Horizon(samples=samples, epochs=epochs, fraction=fraction))


def tail(fraction: float = 0.25) -> Tail:
    """Return the mean over the last `fraction` of the budget."""
    return Tail(fraction=fraction)
