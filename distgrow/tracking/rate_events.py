"""Events of measuring the first learning rate, which come before a run's first update."""

from dataclasses import dataclass
from typing import ClassVar

from distgrow.tracking.base_event import Event
from distgrow.tracking.fields import Above0, Amount, Count, Figure, Figures, Positive, Texts


@dataclass(frozen=True, slots=True, kw_only=True)
class RateTrial(Event):
    """Hold a short run that was made to measure `lr.base: auto`."""

    kind: ClassVar[str] = "lr_trial"

    lr: Amount  #: 0: of the first weights, which it does not move
    loss: Figure  #: mean training loss over its last quarter, or all of it if it moves nothing; null if it diverged
    evaluations: Count  #: gradients that it took
    seconds: Amount


@dataclass(frozen=True, slots=True, kw_only=True)
class RateChoice(Event):
    """Hold what `lr.base: auto` has been measured as, before the first update."""

    kind: ClassVar[str] = "lr_choice"

    base: Above0  #: the choice: the rate of the least loss, but well below the largest stable one
    largest_stable: Above0
    first_loss: Figure  #: mean training loss of the first weights; what ends below it is stable
    lrs: Figures  #: the learning rates that were tried
    losses: Figures  #: of each, the mean training loss over the last quarter of its short run; null: it diverged
    verdicts: Texts  #: of each, stable or unstable
    batch: Positive  #: of the short runs, b₀
    updates: Positive  #: of each
    evaluations: Count  #: gradients that all of them took
    seconds: Amount
