"""Growth in place of the learning rate's decay: what Seesaw and Increase share."""

import math
from typing import ClassVar

from distgrow.core.errors import ConfigError
from distgrow.core.lr import LR, NoDecay, Span
from distgrow.core.progress import Progress
from distgrow.core.stages import Following, Stages, Trigger
from distgrow.growth.base import needs_samples
from distgrow.growth.objective import Aimed


class Replacing(Aimed):
    """Growth in place of the LR's decay: wherever the decay has fallen by another δ, the batch grows by δ."""

    sets_stages: ClassVar[bool] = True
    brings_rule: ClassVar[bool] = True
    power: ClassVar[float]

    @property
    def last_stage(self) -> float:
        return math.inf

    def trigger(self, stages: Stages, lr: LR, span: Span) -> Trigger:
        if isinstance(lr.decay, NoDecay):
            raise ConfigError(f"{self.name} growth replaces a decay: set lr.decay to step, cosine or wsd")
        needs_samples(f"growth.kind={self.name}", span)
        return Following(decay=lr.decay, span=span, level=lambda stage: self.factor ** -(stage + 1))

    def multiplier(self, lr: LR, progress: Progress, batch: int, span: Span) -> float:
        """δ^−m·(b/b₀)^power: what the batch could not take (above all beyond the cap) the learning rate decays by."""
        grown = self.grown(progress.stage, batch)
        warm = lr.decay.warm(progress.ledger.applied, batch, span)
        return warm * self.factor**-progress.stage * grown.ratio**self.power

    def rate_growth(self, lr: LR, progress: Progress, batch: int) -> float:
        return self.grown(progress.stage, batch).ratio ** self.power
