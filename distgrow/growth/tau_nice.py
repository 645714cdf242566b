"""The best constant batch of a strongly convex finite sum whose constants are known."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from distgrow.core.errors import ConfigError
from distgrow.core.lr import LR, Span
from distgrow.core.spec import PosFloat, by_position
from distgrow.core.stages import Stages, Trigger
from distgrow.growth.base import GrowthPolicy
from distgrow.theory.finite_sum import FiniteSum


class TauNice(GrowthPolicy):
    """The best constant batch of SGD on a strongly convex finite sum whose constants are known (Alfarra et al. 2020).

    τ* = n(κ − (L_max − L))/(κ + nL − L_max), κ = 2h̄/(εμ), as a whole number of samples; tau_nice.py has the symbols.
    """

    kind: Literal["tau_nice"] = "tau_nice"
    start: int = Field(default=0, init=False, exclude=True)
    samples: Annotated[int, Field(ge=2)]
    """n, samples of the training set."""
    smoothness: PosFloat
    """L of the mean loss."""
    largest_smoothness: PosFloat
    """L_max, the largest of any sample's loss; between L and nL."""
    mu: PosFloat
    """μ, strong convexity."""
    optimum_sq: PosFloat
    """h̄, mean squared norm of the samples' gradients at the optimum."""
    epsilon: PosFloat
    """ε, target of E‖θ − θ*‖²."""

    @model_validator(mode="before")
    @classmethod
    def _start_is_the_best(cls, values: Any) -> Any:
        if isinstance(values, dict) and "start" in values:
            raise ConfigError("start follows from the constants; remove it")
        names = ("samples", "smoothness", "largest_smoothness", "mu", "optimum_sq")
        try:
            constants = FiniteSum(**{name: values[name] for name in names})
            return {**values, "start": constants.best_whole_batch(values["epsilon"])}
        except (KeyError, TypeError):
            return values  # told by the checks of the fields themselves
        except ArithmeticError:
            given = ", ".join(f"{name}={values[name]}" for name in (*names, "epsilon"))
            raise ConfigError(f"{given}: no best batch follows from these; give positive numbers nearer to 1") from None

    @property
    def plain_sgd(self) -> bool:
        return True

    @property
    def last_stage(self) -> float:
        return 0

    def trigger(self, stages: Stages, lr: LR, span: Span) -> Trigger:
        if span.epoch != self.samples:
            raise ConfigError(f"growth.samples={self.samples}, but the training set has {span.epoch}; give that number")
        return super().trigger(stages, lr, span)


tau_nice = by_position(TauNice, "samples")
