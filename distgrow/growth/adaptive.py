"""What policies share whose stages end when a measurement says so."""

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from distgrow.core.errors import ConfigError
from distgrow.core.lr import LR, Span
from distgrow.core.progress import PolicyState, Progress
from distgrow.core.stages import Listed, MinStage, Stages, Trigger
from distgrow.growth.base import Geometrical, Measure, Moment


class Adaptive(Geometrical):
    """Growth b₀·δ^m up to a cap whose stages end by measurement. The batch never falls."""

    sets_stages: ClassVar[bool] = True

    @property
    def adaptive(self) -> bool:
        return True

    def trigger(self, stages: Stages, lr: LR, span: Span) -> Trigger:
        """Return where stages end at the latest, whatever is measured; mostly never."""
        self.needs_cap("could grow without end")
        return Listed(axis="samples", ends=())

    def earliest(self, lr: LR, span: Span) -> Trigger:
        """Return where stages could end at the earliest, whatever is measured."""
        return Listed(axis="samples", ends=())

    def stages_up(self, progress: Progress, now: Moment) -> int:
        """Return the number of stages to go up by before the coming update; mostly 0."""
        return 0

    def advance(self, progress: Progress, now: Moment) -> Progress:
        """Return the progress at the stage for the coming update.

        Raises:
            ConfigError: `stages_up` is no whole number from 0 on.
        """
        stages, left = self.stages_up(progress, now), self.last_stage - progress.stage
        if type(stages) is not int or stages < 0:
            raise ConfigError(f"{type(self).__name__}.stages_up is {stages!r}; it must be a whole number from 0 on")
        return progress.grow(stages if stages <= left else int(left))

    def problems(self, stage: int, world: int, max_micro: int, noise_every: int | None) -> list[str]:
        """Return what keeps a stage from being measured, or split whatever its last batch is.

        Args:
            stage: The stage.
            world: Ranks at the stage.
            max_micro: Rows of a micro-batch, at most.
            noise_every: Updates from one measurement of noise to the next; None: the policy's own.
        """
        found: list[str] = []
        batch = self.stage_batch(stage)
        if Measure.NOISE in self.needs and batch == world == 1:
            found.append(
                f"growth.kind={self.name} goes by gradient noise, which a batch of one sample on one rank does not "
                "show; raise growth.start to at least 2"
            )
        if self.start < world <= batch:
            found.append(
                f"stage {stage} wants {world} ranks, but the budget may end with a batch of growth.start="
                f"{self.start}; raise growth.start to at least {world} or lower launch.workers"
            )
        if max_micro == 1 and world > 1:
            found.append(
                f"max_micro=1 cannot split every batch that the budget may end with over {world} ranks; "
                "raise engine.max_micro to 2"
            )
        return found

    def earliest_ends(self, min_stage: MinStage, span: Span, stages_at_once: int = 1) -> Trigger:
        """Return the earliest ends if `min_stage` passes before every move, of up to `stages_at_once` stages.

        A move of fewer stages may get to a stage sooner: `min_stage` is fewer samples at a smaller batch.
        """
        begins = [0]
        for stage in range(1, int(self.cap_stage) + 1):
            below = range(stage - stages_at_once, stage) if stage > stages_at_once else (0,)
            begins.append(min(begins[m] + min_stage.least(self.stage_batch(m), span.epoch) for m in below))
        return Listed(axis="samples", ends=tuple(begins[1:]))


class NormProbing(Adaptive):
    """Adaptive growth that has ‖∇f‖ measured exactly before some updates, at n gradient evaluations each."""

    @abstractmethod
    def probe_due(self, progress: Progress) -> bool:
        """Return whether ‖∇f‖ has to be measured before the coming update."""

    @abstractmethod
    def after_probe(self, progress: Progress, norm: float) -> PolicyState:
        """Return the policy's state once ‖∇f‖ has been measured at `progress`."""

    @abstractmethod
    def probe_count(self, updates: int, stage: int) -> int:
        """Return the number of measurements in a run of `updates` updates that ends at `stage`."""


class Endless(Adaptive):
    """Adaptive growth whose stages go on beyond the cap, at which the learning rate decays instead."""

    decay_power: ClassVar[float]  #: η falls by δ^power for each δ that the batch could not grow by

    @property
    def last_stage(self) -> float:
        """Return the last stage: a learning rate below 1e-12 of the cap's moves nothing any more."""
        return self.cap_stage + math.ceil(12 / (self.decay_power * math.log10(self.factor)))

    def remarks(self) -> Sequence[str]:
        fall = self.factor**-self.decay_power
        return [f"at the cap lr falls to {fall:.3g} of itself wherever the batch would have grown, which is not shown"]

    def shortfall(self, stage: int) -> float:
        """Return η's multiplier for the growth that the cap prevented: (cap/(b₀δ^m))^power, 1 below the cap."""
        return self.factor ** (self.decay_power * (self.growth_steps(stage) - stage))

    def multiplier(self, lr: LR, progress: Progress, batch: int, span: Span) -> float:
        return super().multiplier(lr, progress, batch, span) * self.shortfall(progress.stage)
