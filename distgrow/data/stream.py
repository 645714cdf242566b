"""The endless stream of samples, shuffled or sampled: a data set's rows by position."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
from torch.utils.data import default_collate

from distgrow.core.errors import ConfigError
from distgrow.core.order import Int64s, Order, UInt64s, seeds
from distgrow.core.plan import Plan, cut
from distgrow.core.sampling import SamplingSpec
from distgrow.data.dataset import Gathered, Ordered, batched, is_stream, order_of, rows_of
from distgrow.data.iterable import IterableStream
from distgrow.data.seeding import kept_generators
from distgrow.distributed.world import World

_AHEAD = 1024  #: positions


class SampleStream:
    """A map-style data set seen along the endless shuffled sample stream, in the data set's own order if it has one.

    Indices and seeds are made for a block of positions ahead: for a few at a time, numpy's calls would cost most.
    """

    def __init__(self, dataset: Any, *, seed: int = 0, collate: Callable[[list[Any]], Any] | None = None) -> None:
        self.dataset, self.seed, self.collate = dataset, seed, collate or default_collate
        self.size, self.order = len(dataset), order_of(dataset, seed)
        self._batched = batched(dataset, collate)
        self._numbers = np.random.MT19937(0)
        self._block = range(0)
        self._indices, self._seeds = np.empty(0, np.int64), np.empty(0, np.uint64)

    def __getitems__(self, positions: Sequence[int]) -> Any:
        """Return the collated rows at `positions`; each row's random numbers follow from (seed, position) alone."""
        if not positions:
            return None
        indices, row_seeds = self._look_up(positions)
        if self._batched is not None:
            return self._batched.batch(indices, row_seeds)
        with kept_generators(numbers=self._numbers):
            return _collated_rows(self.dataset, indices, row_seeds, self.collate)

    def _look_up(self, positions: Sequence[int]) -> tuple[Int64s, UInt64s]:
        """Return the indices and seeds of some positions."""
        if not isinstance(positions, range):
            given = np.asarray(positions)
            return self.order(given)[1], seeds(self.seed, given)
        if positions.start < self._block.start or positions.stop > self._block.stop:
            self._block = range(positions.start, max(positions.stop, positions.start + _AHEAD))
            block = np.arange(self._block.start, self._block.stop)
            self._indices, self._seeds = self.order(block)[1], seeds(self.seed, block)
        rows = slice(positions.start - self._block.start, positions.stop - self._block.start)
        return self._indices[rows], self._seeds[rows]


@dataclass(frozen=True, slots=True)
class BatchPositions(Sequence[int]):
    """Hold the positions of a micro-batch and of its update: sampled rows follow from both."""

    rows: range
    update: range
    draw: int = 0  #: see Plan

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> range: ...
    def __getitem__(self, index: int | slice) -> int | range:
        """Return one position, or several."""
        return self.rows[index]


class SampledStream(SampleStream):
    """A map-style data set whose every update draws its rows anew, by a sampling in place of an order.

    Positions are BatchPositions. Others are taken for a whole update.
    """

    def __init__(
        self, dataset: Any, sampling: SamplingSpec, *, seed: int = 0, collate: Callable[[list[Any]], Any] | None = None
    ) -> None:
        super().__init__(dataset, seed=seed, collate=collate)
        self.sampling = sampling

    def _look_up(self, positions: Sequence[int]) -> tuple[Int64s, UInt64s]:
        update, draw = (positions.update, positions.draw) if isinstance(positions, BatchPositions) else (positions, 0)
        where = np.arange(positions[0], positions[-1] + 1)
        rows = self.sampling.rows(self.size, self.seed, update[0], len(update), where - update[0], draw)
        return rows, seeds(self.seed, where)


Stream = SampleStream | IterableStream


def micro_batches(plan: Plan, start: int, rank: int, *, sampled: bool) -> Sequence[Sequence[int]]:
    """Return the positions of `rank`'s micro-batches of an update that begins at `start`.

    Args:
        plan: The update.
        start: Its first position.
        rank: The rank.
        sampled: Whether they are for a SampledStream, which needs BatchPositions.
    """
    rows = plan.rows(start, rank)
    update = range(start, start + plan.batch)
    return [BatchPositions(part, update, plan.draw) for part in rows] if sampled else rows


def check_sampled(dataset: Any) -> None:
    """Check that an update may draw any rows of a training set.

    Raises:
        ConfigError: The data set has an order of its own, or no rows by number.
    """
    if is_stream(dataset) or isinstance(dataset, Ordered):
        raise ConfigError(
            f"sampling draws rows by number, but the training set is {type(dataset).__name__}, which has an order of "
            "its own; leave out sampling, or give a data set with __len__ and __getitem__ alone"
        )


def open_stream(
    dataset: Any,
    *,
    seed: int = 0,
    collate: Callable[[list[Any]], Any] | None = None,
    recall: int = 2,
    sampling: SamplingSpec | None = None,
) -> Stream:
    """Return a training set, map-style or iterable, along the stream of samples. For `recall` see IterableStream."""
    if sampling is not None:
        check_sampled(dataset)
        return SampledStream(dataset, sampling, seed=seed, collate=collate)
    if is_stream(dataset):
        return IterableStream(dataset, seed=seed, collate=collate, recall=recall)
    return SampleStream(dataset, seed=seed, collate=collate)


def evaluation_batches(
    dataset: Any, world: World, rows: int, collate: Callable[[list[Any]], Any] | None = None
) -> Iterator[tuple[Any, int]]:
    """Yield this rank's part of a data set, in order: (a collated batch of at most `rows` rows, how many count).

    Every rank has as many batches, since ZeRO 3 gathers parameters at each forward. A rank that has none left repeats a
    row that does not count.
    """
    n = len(dataset)
    first, last = cut(n, world.size, world.rank), cut(n, world.size, world.rank + 1)
    parts = math.ceil(math.ceil(n / world.size) / rows)
    for part in range(parts):
        begin, end = first + cut(last - first, parts, part), first + cut(last - first, parts, part + 1)
        indices = np.arange(begin, end) if end > begin else np.array([0])
        yield _collated(dataset, indices, collate), end - begin


def random_parts(
    dataset: Any, world: World, parts: int, seed: int, collate: Callable[[list[Any]], Any] | None = None
) -> Iterator[tuple[Any, int]]:
    """Yield this rank's share of a data set's random partition into `parts` parts, as (collated rows, how many).

    Parts differ by at most one row. Part k is on the same rank whatever the seed.
    """
    n, order = len(dataset), Order(n=len(dataset), seed=seed)
    for part in range(cut(parts, world.size, world.rank), cut(parts, world.size, world.rank + 1)):
        _, indices = order(np.arange(cut(n, parts, part), cut(n, parts, part + 1)))
        yield _collated(dataset, indices, collate), len(indices)


def _collated(dataset: Any, indices: Int64s, collate: Callable[[list[Any]], Any] | None) -> Any:
    if (whole := batched(dataset, collate)) is not None:
        return whole.batch(indices, seeds(0, indices))
    with kept_generators():
        return _collated_rows(dataset, indices, seeds(0, indices), collate or default_collate)


def _collated_rows(dataset: Any, indices: Int64s, row_seeds: UInt64s, collate: Callable[[list[Any]], Any]) -> Any:
    """Return the collated rows `indices`; of most data sets each is read after generators were seeded with its seed."""
    if isinstance(dataset, Gathered):
        return dataset.collated(indices, row_seeds, collate)
    return collate(rows_of(dataset, indices, row_seeds))
