"""Samplings: which rows an update draws, by arithmetic from (seed, first position, batch); knows no data set.

Every kind draws each sample with probability b/n. Most draw b rows, so the batch's plain mean gradient is unbiased.
Independent kinds draw a random number of rows, b on average: their sum of gradients over b, not over that number, is
unbiased. Rows of one update are all different. Updates are independent: of the n samples of an epoch some come twice,
some not.
"""

from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Annotated, ClassVar, Literal

import numpy as np
from pydantic import Field

from distgrow.core.counted import counted
from distgrow.core.endless import ENDLESS
from distgrow.core.errors import ConfigError
from distgrow.core.order import Int64s, Order, mix_int
from distgrow.core.plan import cut
from distgrow.core.spec import PosInt, Spec

_SALT = 0x5A3


class SamplingSpec(Spec, ABC):
    """Say how the rows of an update are drawn, independently of all other updates."""

    shows_noise: ClassVar[bool]  #: whether micro-batches differ as batches do, so that they show the gradient's noise
    draws_size: ClassVar[bool] = False  #: whether the number of rows is random

    @property
    def name(self) -> str:
        """Return the sampling's `sampling.kind`."""
        return type(self).model_fields["kind"].default

    def check(self, n: int) -> None:
        """Check that a training set of `n` samples can be drawn from so.

        Raises:
            ConfigError: It cannot.
        """
        if n == ENDLESS:
            raise ConfigError("sampling draws rows by number, which a stream without a length has not; leave it out")

    def largest(self, n: int) -> int:
        """Return the largest batch."""
        return n

    def size(self, n: int, seed: int, start: int, draw: int, batch: int) -> int:
        """Return the number of rows of an update whose mean is `batch`: that itself, unless it is random.

        For the other arguments see `rows`.
        """
        return self._size(n, _key(seed, start, draw), batch) if self.draws_size else batch

    def rows(self, n: int, seed: int, start: int, batch: int, offsets: Int64s, draw: int = 0) -> Int64s:
        """Return the rows at `offsets` of an update.

        Args:
            n: Samples of the training set.
            seed: Of the run.
            start: The first stream position of the update.
            batch: Samples of the update, at most `largest(n)`, or what `size` has drawn.
            offsets: Places in the update, 0 … batch − 1.
            draw: Applied updates before this one, if the number of rows is random: it may be 0, and `start` then stays.
        """
        return self._drawn(n, _key(seed, start, draw), batch, offsets)

    def _size(self, n: int, key: int, batch: int) -> int:
        return batch

    @abstractmethod
    def _drawn(self, n: int, key: int, batch: int, offsets: Int64s) -> Int64s: ...


def _key(seed: int, start: int, draw: int) -> int:
    key = mix_int(mix_int(seed, _SALT), start)
    return mix_int(key, draw) if draw else key


def _binomial(n: int, mean: int, key: int) -> int:
    """Return how many of n coins show heads, each with probability mean/n.

    RandomState's numbers are the same in every version of numpy, unlike those of its Generator, so that a run can be
    resumed with another one.
    """
    return int(np.random.RandomState([key % 2**32, key >> 32]).binomial(n, mean / n))


class NiceSampling(SamplingSpec):
    """Every update draws a subset of the training set, each of its size with the same probability (τ-nice)."""

    shows_noise: ClassVar[bool] = True

    kind: Literal["nice"] = "nice"

    def _drawn(self, n: int, key: int, batch: int, offsets: Int64s) -> Int64s:
        return Order(n=n, seed=key)(offsets)[1]


class InParts(SamplingSpec):
    """A sampling of a training set in parts: rows 0 … n₁ − 1, the next n₂, and so on."""

    shows_noise: ClassVar[bool] = False

    parts: PosInt | Annotated[list[PosInt], Field(min_length=1)]
    """The number of parts, which then differ by at most one row, or the rows of each. Rows are in the data set's
    order."""

    def sizes(self, n: int) -> list[int]:
        """Return the rows of each part.

        Raises:
            ConfigError: They do not make up the training set.
        """
        if isinstance(self.parts, int):
            if self.parts > n:
                raise ConfigError(
                    f"sampling.parts={self.parts} exceeds the {counted(str(n), 'sample')} of the training set; lower it"
                )
            return [cut(n, self.parts, j + 1) - cut(n, self.parts, j) for j in range(self.parts)]
        if sum(self.parts) != n:
            raise ConfigError(
                f"sampling.parts={self.parts} sums to {sum(self.parts)}, but the training set has "
                f"{counted(str(n), 'sample')}; give the rows of each part, or the number of parts"
            )
        return self.parts

    def check(self, n: int) -> None:
        """See SamplingSpec.check. The parts must make up the training set."""
        super().check(n)
        self.sizes(n)

    def _edges(self, n: int) -> list[int]:
        return [0, *accumulate(self.sizes(n))]


class IndependentSampling(SamplingSpec):
    """Every update takes each row by a coin of its own, with probability b/n: a random number of rows, b on average.

    The rows that all coins choose are a binomial number of them, and given that number any subset alike.
    """

    shows_noise: ClassVar[bool] = False
    draws_size: ClassVar[bool] = True

    kind: Literal["independent"] = "independent"

    def _size(self, n: int, key: int, batch: int) -> int:
        return _binomial(n, batch, mix_int(key, 0))

    def _drawn(self, n: int, key: int, batch: int, offsets: Int64s) -> Int64s:
        return Order(n=n, seed=mix_int(key, 1))(offsets)[1]


class OnePart(InParts):
    """A sampling whose every update draws one part, with a probability proportional to its rows, and rows of it."""

    def largest(self, n: int) -> int:
        """Return the rows of the smallest part."""
        return min(self.sizes(n))

    def _part(self, n: int, key: int) -> range:
        edges = self._edges(n)
        part = bisect_right(edges, mix_int(key, 0) % n) - 1
        return range(edges[part], edges[part + 1])

    def _drawn(self, n: int, key: int, batch: int, offsets: Int64s) -> Int64s:
        part = self._part(n, key)
        return part.start + Order(n=len(part), seed=mix_int(key, 1))(offsets)[1]


class PartitionSampling(OnePart):
    """Every update draws one part, with a probability proportional to its rows, and a subset of that part alone."""

    kind: Literal["partition"] = "partition"


class PartitionIndependentSampling(OnePart):
    """Every update draws one part, with a probability proportional to its rows, and takes each row of it by a coin.

    Of part j each row is taken with probability b/n_j: a random number of rows, b on average.
    """

    draws_size: ClassVar[bool] = True

    kind: Literal["partition_independent"] = "partition_independent"

    def _size(self, n: int, key: int, batch: int) -> int:
        return _binomial(len(self._part(n, key)), batch, mix_int(key, 2))


class StratifiedSampling(InParts):
    """Every update draws its share of every part, b·n_j/n rows, rounded up or down at random if that is not whole.

    Rows come part after part: if there are as many equal parts as ranks, and these divide the batch, a rank reads the
    rows of one part alone.
    """

    kind: Literal["stratified"] = "stratified"

    def _drawn(self, n: int, key: int, batch: int, offsets: Int64s) -> Int64s:
        edges, shift = self._edges(n), mix_int(key, 0) % n
        places = [(batch * edge + shift) // n for edge in edges]
        rows = np.empty_like(offsets)
        for part, ((first, end), (begin, stop)) in enumerate(zip(pairwise(edges), pairwise(places), strict=True)):
            here = (offsets >= begin) & (offsets < stop)
            if here.any():
                rows[here] = first + Order(n=end - first, seed=mix_int(key, part + 1))(offsets[here] - begin)[1]
        return rows


Sampling = Annotated[
    NiceSampling | IndependentSampling | PartitionSampling | PartitionIndependentSampling | StratifiedSampling,
    Field(discriminator="kind"),
]


def nice_sampling() -> NiceSampling:
    """Return the sampling whose every update draws any subset of its size alike."""
    return NiceSampling()


def independent_sampling() -> IndependentSampling:
    """Return the sampling whose every update takes each row by a coin of its own, b rows on average."""
    return IndependentSampling()


def partition_sampling(parts: int | Sequence[int]) -> PartitionSampling:
    """Return the sampling whose every update draws a subset of one part; `parts`: their number, or their rows."""
    return PartitionSampling(parts=parts if isinstance(parts, int) else list(parts))


def partition_independent_sampling(parts: int | Sequence[int]) -> PartitionIndependentSampling:
    """Return the sampling whose every update takes each row of one part by a coin; `parts`: their number, or rows."""
    return PartitionIndependentSampling(parts=parts if isinstance(parts, int) else list(parts))


def stratified_sampling(parts: int | Sequence[int]) -> StratifiedSampling:
    """Return the sampling whose every update draws its share of every part; `parts`: their number, or their rows."""
    return StratifiedSampling(parts=parts if isinstance(parts, int) else list(parts))
