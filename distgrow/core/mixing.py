"""MixedOrder: position in the sample stream → which of several data sets, and which of its rows; pure arithmetic.

Positions go to data sets by the golden-ratio sequence u(p) = (A·p + key) mod 2⁶⁴: set j takes those with u in an
interval as long as its weight. Of any n positions in a row it takes n·w_j up to a few. How many it took before a
position is a sum of floors, in O(log) steps (Graham, Knuth & Patashnik, Concrete Mathematics, 3.5), so any position can
be asked for.
"""

import math
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

import numpy as np
import numpy.typing as npt

from distgrow.core.errors import ConfigError
from distgrow.core.order import Int64s, mix_int

_M, _A = 2**64, 0x9E3779B97F4A7C15
_SALT = 0x313
#: The weight of a data set: one number, or numbers from given samples on, {0: 1.0, 100_000: 0.5}.
Weight = float | Mapping[int, float]
Positioned = Callable[[Any], tuple[Int64s, Int64s]]


def floor_sum(n: int, m: int, a: int, b: int) -> int:
    """Return Σ ⌊(a·i + b)/m⌋ over 0 ≤ i < n, for n, a, b ≥ 0 and m ≥ 1."""
    total = 0
    while n > 0:
        total += (a // m) * (n * (n - 1) // 2) + (b // m) * n
        a, b = a % m, b % m
        top = a * n + b
        if top < m:
            break
        n, b, m, a = top // m, top % m, a, m
    return total


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Hold the weights of data sets as intervals of 0 … 2⁶⁴, from given positions on."""

    begins: tuple[int, ...]  #: of spans of equal weights; the first is 0
    ends: tuple[tuple[int, ...], ...]  #: of each span: the end of each set's interval

    @classmethod
    def of(cls, weights: Sequence[Weight]) -> "Weights":
        """Return the intervals of weights, which need not sum to 1.

        Raises:
            ConfigError: A weight is negative, not finite or missing at sample 0, or all are 0 somewhere.
        """
        tables = [_table(number, weight) for number, weight in enumerate(weights)]
        begins = sorted({begin for table in tables for begin in table})
        spans: list[tuple[int, ...]] = []
        for begin in begins:
            here = [table[max(b for b in table if b <= begin)] for table in tables]
            total = math.fsum(here)
            if not total > 0:
                raise ConfigError(
                    f"mixture: the weights of all {len(here)} sets are 0 from sample {begin:,} on; raise one"
                )
            sums = list(accumulate(weight / total for weight in here))
            last = max(k for k, weight in enumerate(here) if weight > 0)
            spans.append(tuple(_M if k >= last else min(_M - 1, round(s * _M)) for k, s in enumerate(sums)))
        return cls(begins=tuple(begins), ends=tuple(spans))


def _table(number: int, weight: Weight) -> Mapping[int, float]:
    table = weight if isinstance(weight, Mapping) else {0: weight}
    for begin, value in table.items():
        if type(begin) is not int or begin < 0:
            raise ConfigError(f"mixture: weight of set {number} from {begin!r} on: allowed are whole samples from 0")
        if type(value) not in (int, float) or not 0 <= value < math.inf:
            raise ConfigError(f"mixture: weight {value!r} of set {number}: allowed are finite numbers from 0")
    if 0 not in table:
        raise ConfigError(f"mixture: set {number} has no weight from sample 0 on; add 0: …")
    return table


@dataclass(frozen=True, kw_only=True)
class MixedOrder:
    """Draw from several data sets by weight. Rows are numbered through, set after set."""

    orders: tuple[Positioned, ...]  #: of each set's own rows
    sizes: tuple[int, ...]  #: rows of each set
    weights: Weights
    seed: int = 0

    @cached_property
    def _key(self) -> int:
        return mix_int(self.seed, _SALT) * 2

    @cached_property
    def _before(self) -> list[list[int]]:
        """How many positions each set has taken before each span of weights."""
        taken = [[0] * len(self.sizes)]
        for k, begin in enumerate(self.weights.begins[1:]):
            taken.append([n + m for n, m in zip(taken[-1], self._within(k, begin), strict=True)])
        return taken

    def __call__(self, positions: npt.ArrayLike) -> tuple[Int64s, Int64s]:
        """Return (passes of the sets drawn, rows) of stream positions ≥ 0, as int64 arrays of the same shape."""
        where = np.asarray(positions, dtype=np.int64)
        sets, counts = self.draws(where.reshape(-1))
        epochs, rows = np.empty_like(counts), np.empty_like(counts)
        first = 0
        for number, (order, size) in enumerate(zip(self.orders, self.sizes, strict=True)):
            if (here := sets == number).any():
                epochs[here], own = order(counts[here])
                rows[here] = first + own
            first += size
        return epochs.reshape(where.shape), rows.reshape(where.shape)

    def draws(self, positions: Int64s) -> tuple[Int64s, Int64s]:
        """Return the set that takes each position, and how many positions it took before."""
        sets, counts = np.empty_like(positions), np.empty_like(positions)
        at = np.argsort(positions, kind="stable")
        ordered = positions[at]
        spans = np.searchsorted(np.asarray(self.weights.begins), ordered, side="right") - 1
        breaks = np.flatnonzero((np.diff(ordered) > 1) | (np.diff(spans) > 0)) + 1  # runs of positions in a row
        for run in np.split(at, breaks):
            if run.size:
                begin, stop = int(positions[run[0]]), int(positions[run[-1]]) + 1
                own_sets, own_counts = self._run(begin, stop)
                sets[run], counts[run] = own_sets[positions[run] - begin], own_counts[positions[run] - begin]
        return sets, counts

    def _run(self, begin: int, stop: int) -> tuple[Int64s, Int64s]:
        """Return what `draws` does for begin … stop − 1, all of them in one span of weights."""
        k = bisect_right(self.weights.begins, begin) - 1
        ends, steps = self.weights.ends[k], np.arange(stop - begin, dtype=np.uint64)
        u = steps * np.uint64(_A) + np.uint64((_A * begin + self._key) % _M)
        inner = np.array([end for end in ends if end < _M], np.uint64)
        sets = np.searchsorted(inner, u, side="right").astype(np.int64)
        counts = np.empty_like(sets)
        for number, (before, within) in enumerate(zip(self._before[k], self._within(k, begin), strict=True)):
            here = sets == number
            counts[here] = before + within + np.arange(int(here.sum()))
        return sets, counts

    def _within(self, k: int, position: int) -> list[int]:
        """Return how many positions each set takes from the beginning of span k up to `position`."""
        below = [self._below(position, end) - self._below(self.weights.begins[k], end) for end in self.weights.ends[k]]
        return [now - before for now, before in zip(below, [0, *below[:-1]], strict=True)]

    def _below(self, position: int, end: int) -> int:
        """Count the positions before `position` whose u is below `end`: u < end if ⌊x/m⌋ − ⌊(x − end)/m⌋ is 1."""
        whole, less = floor_sum(position, _M, _A, self._key), floor_sum(position, _M, _A, self._key + _M - end)
        return whole - less + position
