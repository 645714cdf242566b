"""Plan: one global batch as world × micro × accum, and which rows each rank takes. Pure arithmetic."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

from distgrow.core.errors import ConfigError
from distgrow.core.optimizer_plan import OptimizerPlan


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Hold one decided update. Every rank holds the same Plan."""

    batch: int  #: samples of the global batch, B
    world: int  #: ranks
    micro: int  #: rows of the largest micro-batch of any rank
    accum: int  #: micro-batches per rank, the same on every rank
    lr: float  #: learning rate of this update
    stage: int  #: of the batch schedule, from 0
    seed: int = 0  #: of the update's own random numbers (dropout); rank is mixed in by the engine
    probe: bool = False  #: the gradient is computed as for an update, but nothing is applied
    window: int = 0  #: measured updates that the noise's means remember; 0: this one is not measured
    preconditioned: bool = False  #: gradients are measured in the metric of the optimizer's steps
    by_parameter: bool = False  #: gradients are measured parameter by parameter, too
    product: bool = False  #: the progress test's product with the update before is wanted
    average: float = 0.0  #: weight of the parameters after this update in their average; 0: they are not taken in
    active: int | None = None  #: experts that a token uses; None: as many as the model has always used
    density: float = 1.0  #: share of the weights of kernels that are not 0; it falls where the model is pruned
    share: float = 1.0  #: share of the weights of kernels that a token uses; below 1 where experts are not active
    optimizer: OptimizerPlan | None = None  #: what its settings follow from; None: they do not follow the batch
    expected: int | None = None  #: mean of B, by which sums are divided, where B is drawn; None: B is no random number
    draw: int = 0  #: applied updates before this one, where B is drawn; it tells apart updates at one position

    @property
    def parts(self) -> int:
        """Return the number of micro-batches of all ranks: as many independent gradients."""
        return self.world * self.accum

    @property
    def spared(self) -> float:
        """Return the samples that pruning and experts spare: batch·(1 − density·share)."""
        return self.batch * (1 - self.density * self.share)

    @property
    def scheduled(self) -> int:
        """Return the batch that the schedule gives: the mean of B if B is drawn, else B."""
        return self.batch if self.expected is None else self.expected

    @property
    def told(self) -> int:
        """Return a number above 0 that ranks compare: they must have drawn and scheduled alike."""
        return self.batch + (self.expected or 0)

    def rows(self, start: int, rank: int) -> list[range]:
        """Return the stream positions of `rank`'s micro-batches if the global batch begins at position `start`.

        Shares of ranks, and micro-batches of a rank, are contiguous, differ by at most one row and, unless B is drawn,
        are never empty.
        Over all ranks they cover `range(start, start + batch)` exactly once.
        """
        edges = _edges(self.batch, self.world, self.accum, rank)
        return [range(start + a, start + b) for a, b in pairwise(edges)]

    def sizes(self, rank: int) -> list[int]:
        """Return the numbers of rows of `rank`'s micro-batches."""
        return [b - a for a, b in pairwise(_edges(self.batch, self.world, self.accum, rank))]

    def weight(self, rows: int) -> float:
        """Return the factor of a micro-batch's mean loss that makes the average over ranks the mean over the B samples.

        If B is drawn, that average is the sum over the samples divided by the mean of B. For a probe it is NaN, which
        no engine applies.
        """
        return math.nan if self.probe else rows * self.world / self.scheduled


def cut(total: int, parts: int, k: int) -> int:
    """Return where part k begins if `total` rows are cut into `parts` that differ by at most one row."""
    return total * k // parts


@lru_cache(maxsize=256)
def _edges(batch: int, world: int, accum: int, rank: int) -> list[int]:
    """Return where `rank`'s micro-batches begin within the global batch, and the end of the last."""
    if not 0 <= rank < world:  # whose rows would be those of another update
        raise ConfigError(
            f"rank={rank}: allowed is 0 to {world - 1}, as the plan is for world={world}; give both alike"
        )
    first, last = cut(batch, world, rank), cut(batch, world, rank + 1)
    return [first + cut(last - first, accum, k) for k in range(accum + 1)]


def split(batch: int, world: int, max_micro: int) -> tuple[int, int]:
    """Return (micro, accum) for `batch` samples over `world` ranks, with at most `max_micro` rows a micro-batch.

    The micro-batch grows first, then the accumulation.

    Raises:
        ConfigError: if a rank or a micro-batch would be empty.
    """
    if world < 1 or max_micro < 1:
        raise ConfigError(f"world={world} and max_micro={max_micro} must both be at least 1")
    if batch < world:
        raise ConfigError(
            f"batch={batch} is smaller than world={world}: every rank needs a row; "
            f"raise growth.start to at least {world} or use at most {batch} workers"
        )
    smallest, largest = batch // world, -(-batch // world)
    accum = -(-largest // max_micro)
    if accum > smallest:
        raise ConfigError(
            f"max_micro={max_micro} cannot split batch={batch} over world={world}: a rank would have an empty "
            f"micro-batch; raise engine.max_micro to 2 or make every batch a multiple of {world}"
        )
    return -(-largest // accum), accum


def split_drawn(batch: int, world: int, max_micro: int) -> tuple[int, int]:
    """Return (micro, accum) like `split`, for a batch that is drawn: shares and micro-batches may be empty."""
    largest = max(1, -(-batch // world))
    accum = -(-largest // max_micro)
    return -(-largest // accum), accum


def largest(fits: Callable[[int], bool], first: int, most: int) -> int:
    """Return the largest size in 1 … most that fits, or 0 if not even 1 does.

    Whatever is smaller than a size that fits must fit too. The search tries `first`, doubles it until something does
    not fit, then halves the gap.
    """
    good, bad = 0, min(first, most)
    while good < most and fits(bad):
        good, bad = bad, min(2 * bad, most)
    if good == most:
        return most
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if fits(middle) else (good, middle)
    return good
