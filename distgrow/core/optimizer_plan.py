"""OptimizerPlan: what becomes of an optimizer's decays and moments when the batch grows. Pure arithmetic."""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from distgrow.core.spec import Spec

#: What a setting is kept by: the same at every update, or the same effect over as many samples.
Per = Literal["updates", "samples"]


class AtGrowth(Spec):
    """What becomes of the optimizer's memory when the batch changes. The settings are those of b₀, growth.start."""

    beta2: Per = "updates"
    """samples: the second moment remembers as many samples at every batch: β₂ ← β₂^(b/b₀). It is AdamW's and NAdam's
    beta2, RMSprop's alpha and Adadelta's rho."""
    momentum: Per = "updates"
    """samples: the same for the first moment: AdamW's and NAdam's beta1, SGD's momentum. The steps do not become
    shorter."""
    weight_decay: Per = "updates"
    """samples: decoupled weight decay takes the same share of a parameter over as many samples, whatever the batch and
    what the learning rate makes of it: λ ← λ·(b/b₀)/ρ, with ρ the factor by which growth has changed η."""
    moments: Literal["keep", "reset"] = "keep"
    """reset: the first moments begin anew, at 0, with the first update of another batch."""

    def asked(self) -> list[str]:
        """Return the settings that are to follow the batch."""
        return [name for name in ("beta2", "momentum", "weight_decay") if getattr(self, name) == "samples"]

    @cached_property
    def changes(self) -> bool:
        """Return whether anything differs from an optimizer that knows nothing of the batch."""
        return self.moments != "keep" or bool(self.asked())


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerPlan:
    """Hold what the optimizer's settings follow from at one update."""

    spec: AtGrowth
    ratio: float  #: b/b₀
    decay: float  #: what keeps λ's effect over as many samples: (b/b₀)/ρ
    step: int  #: updates before this one
    samples: float  #: their samples, in first batches
    moment_step: int  #: those updates that the first moments are made of
    moment_samples: float  #: their samples, in first batches

    @property
    def reset(self) -> bool:
        """Return whether the first moments begin anew with this update."""
        return self.spec.moments == "reset" and self.moment_step == 0 and self.step > 0

    def beta2(self, first: float) -> float:
        """Return the second moment's decay, which is `first` at b₀."""
        return first**self.ratio if self.spec.beta2 == "samples" else first

    def momentum(self, first: float) -> float:
        """Return the first moment's decay, which is `first` at b₀."""
        return first**self.ratio if self.spec.momentum == "samples" else first

    def weight_decay(self, first: float) -> float:
        """Return λ, which is `first` at b₀."""
        return first * self.decay if self.spec.weight_decay == "samples" else first

    def moment_factor(self, beta1: float) -> float:
        """Return what Adam's m̂ has to be multiplied by to be a mean of gradients.

        Adam divides m by 1 − β₁ᵗ, as if β₁ had always been what it is now, and m had never been reset. The weights of
        the gradients in m really add up to 1 − ∏β₁, over the updates since m was 0.

        Args:
            beta1: β₁ at b₀.
        """
        by_samples = self.spec.momentum == "samples"
        there = self.moment_samples + self.ratio if by_samples else self.moment_step + 1.0
        return _mass(self.momentum(beta1), self.step + 1.0) / _mass(beta1, there)

    def root_factor(self, beta2: float) -> float:
        """Return what 1/√v̂ of Adam has to be multiplied by: as `moment_factor`, for the second moment.

        Args:
            beta2: β₂ at b₀.
        """
        there = self.samples + self.ratio if self.spec.beta2 == "samples" else self.step + 1.0
        return math.sqrt(_mass(beta2, there) / _mass(self.beta2(beta2), self.step + 1.0))


def _mass(beta: float, updates: float) -> float:
    """Return 1 − β^updates, the sum of the weights in a moment that began at 0."""
    return -math.expm1(updates * math.log(beta)) if beta > 0 else 1.0
