"""Loader: draws exactly the rows of a plan, prefetching ahead of the cursor; knows nothing of why a plan is so."""

import random
import signal
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from distgrow.controller import Controller
from distgrow.order import Int64s, Order, UInt64s, seeds
from distgrow.plan import Plan, cut
from distgrow.progress import Progress
from distgrow.world import World


@runtime_checkable
class Batched(Protocol):
    """A data set that can make a whole collated batch at once; optional, faster."""

    def __len__(self) -> int: ...

    def batch(self, indices: Int64s, seeds: UInt64s) -> Any:
        """The collated rows `indices`; anything random follows from each row's own seed."""
        ...


class Positions:
    """A map-style data set seen along the endless shuffled sample stream."""

    def __init__(self, dataset: Any, *, seed: int = 0, collate: Callable[[list[Any]], Any] | None = None) -> None:
        self.dataset, self.seed, self.collate = dataset, seed, collate or default_collate
        self.order = Order(n=len(dataset), seed=seed)

    def __getitems__(self, positions: range) -> Any:
        """The collated rows at `positions`; each row's random numbers follow from (seed, position) alone."""
        if not positions:
            return None
        _, indices = self.order(np.arange(positions.start, positions.stop))
        row_seeds = seeds(self.seed, np.arange(positions.start, positions.stop))
        if isinstance(self.dataset, Batched):
            return self.dataset.batch(indices, row_seeds)
        with kept_random_state():
            return self.collate([self._row(*pair) for pair in zip(indices.tolist(), row_seeds.tolist(), strict=True)])

    def _row(self, index: int, seed: int) -> Any:
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.default_generator.manual_seed(seed)
        return self.dataset[index]


@contextmanager
def kept_random_state() -> Iterator[None]:
    """Python's, numpy's and torch's CPU random states are afterwards what they were before."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


class Loader(Protocol):
    """Where micro-batches come from."""

    def draw(self, progress: Progress, plan: Plan) -> Iterator[Any]:
        """This rank's micro-batches of the update that `plan` describes, one after the other."""
        ...


class DirectLoader:
    """Loads in this process, when asked."""

    def __init__(self, positions: Positions, rank: int) -> None:
        self._positions, self._rank = positions, rank

    def draw(self, progress: Progress, plan: Plan) -> Iterator[Any]:
        """See Loader."""
        return map(self._positions.__getitems__, plan.rows(progress.samples, self._rank))


class PrefetchingLoader:
    """Worker processes load ahead, along the plans that the controller forecasts.

    The workers are torch's DataLoader's, started once. Where a forecast proves wrong (a skipped update, an adaptive
    schedule) what was drawn too far is dropped and drawn again from the true cursor.
    """

    def __init__(
        self, positions: Positions, rank: int, controller: Controller, *, workers: int, prefetch: int, pin: bool
    ) -> None:
        self._controller, self._rank = controller, rank
        self._ahead: Iterator[range] = iter(())
        self._issued: deque[range] = deque()
        self._source = DataLoader(
            _as_dataset(positions),
            batch_sampler=_Sampler(self._issue),  # pyright: ignore[reportArgumentType]
            collate_fn=_as_is,
            num_workers=workers,
            prefetch_factor=prefetch,
            persistent_workers=True,
            pin_memory=pin,
            worker_init_fn=_outlive_sigterm,
            generator=torch.Generator().manual_seed(positions.seed),
        )
        self._stream: Iterator[Any] | None = None

    def draw(self, progress: Progress, plan: Plan) -> Iterator[Any]:
        """See Loader."""
        wanted = deque(plan.rows(progress.samples, self._rank))
        turned = self._stream is None
        if self._stream is None:
            self._turn(wanted, progress, plan)
            self._stream = iter(self._source)
        while wanted:
            batch = next(self._stream)
            rows = self._issued.popleft()
            if rows == wanted[0]:
                wanted.popleft()
                yield batch
            elif not turned:
                turned = True
                self._turn(wanted, progress, plan)

    def _turn(self, wanted: deque[range], progress: Progress, plan: Plan) -> None:
        self._ahead = chain(list(wanted), self._forecast(progress.repeat(plan.batch, 1)))

    def _forecast(self, progress: Progress) -> Iterator[range]:
        for stride in self._controller.forecast(progress):
            batch, start = stride.plan.batch, stride.begin.samples
            for k in range(stride.updates):
                yield from stride.plan.rows(start + k * batch, self._rank)

    def _issue(self) -> range:
        rows = next(self._ahead, range(0))
        self._issued.append(rows)
        return rows


class _Sampler:
    """An endless batch sampler that asks for the next rows when a worker is free."""

    def __init__(self, issue: Callable[[], range]) -> None:
        self._issue = issue

    def __iter__(self) -> Iterator[range]:
        while True:
            yield self._issue()


def _as_dataset(positions: Positions) -> Dataset[Any]:
    return positions  # pyright: ignore[reportReturnType]


def _outlive_sigterm(worker: int) -> None:
    """SIGTERM is for the trainer, which still needs its workers until it has checkpointed (SLURM tells all)."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _as_is(batch: Any) -> Any:
    return batch


def evaluation_batches(
    dataset: Any, world: World, rows: int, collate: Callable[[list[Any]], Any] | None = None
) -> Iterator[Any]:
    """This rank's part of a data set in its own order, in collated batches of at most `rows` rows."""
    first, last = cut(len(dataset), world.size, world.rank), cut(len(dataset), world.size, world.rank + 1)
    for start in range(first, last, rows):
        indices = np.arange(start, min(start + rows, last))
        if isinstance(dataset, Batched):
            yield dataset.batch(indices, seeds(0, indices))
        else:
            with kept_random_state():
                yield (collate or default_collate)([dataset[int(i)] for i in indices])
