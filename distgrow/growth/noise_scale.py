"""Growth that follows the measured noise scale."""

from typing import ClassVar, Literal

from distgrow.core.progress import Progress
from distgrow.core.spec import PosFloat, by_position
from distgrow.growth.base import Moment
from distgrow.growth.target_batch import NoiseRatio
from distgrow.theory.noise import noise_scale as simple_noise_scale


class NoiseScale(NoiseRatio):
    """b follows the noise scale B_simple = tr Σ/|∇f|² (McCandlish et al. 2018), times `share`."""

    kind: Literal["noise_scale"] = "noise_scale"
    old_kinds: ClassVar[tuple[str, ...]] = ("gns",)
    share: PosFloat = 1.0
    """The batch over B_simple: 1 costs twice the fewest gradient evaluations and twice the fewest updates."""

    def target(self, variance: float, gradient_sq: float, progress: Progress, now: Moment) -> float:
        return self.share * simple_noise_scale(variance, gradient_sq)


noise_scale = by_position(NoiseScale, "start", "cap", "factor")
