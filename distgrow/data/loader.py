"""Loader: draws exactly the rows of a plan, prefetching ahead of the cursor; knows nothing of why a plan is so."""

import math
import os
import random
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.random import mtrand
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset, default_collate

from distgrow.core.order import Int64s, Order, UInt64s, seeds
from distgrow.core.plan import Plan, cut
from distgrow.core.progress import Progress
from distgrow.distributed.world import World
from distgrow.growth.controller import Controller
from distgrow.run.folder import Loading


@runtime_checkable
class Batched(Protocol):
    """A data set that can make a whole collated batch at once; optional, faster."""

    def __len__(self) -> int: ...

    def batch(self, indices: Int64s, seeds: UInt64s) -> Any:
        """The collated rows `indices`; anything random follows from each row's own seed."""
        ...


class Tensors:
    """torch's TensorDataset: no row of it is random, so a batch is a row of each tensor's, taken at once."""

    def __init__(self, dataset: TensorDataset) -> None:
        self._tensors = dataset.tensors

    def __len__(self) -> int:
        return len(self._tensors[0])

    def batch(self, indices: Int64s, seeds: UInt64s) -> list[Tensor]:
        """What default_collate makes of the rows."""
        rows = torch.from_numpy(indices)
        # as tensor[rows], which takes up to five times as long where a row is one piece of memory
        return [tensor.index_select(0, rows.to(tensor.device)) for tensor in self._tensors]


def batched(dataset: Any, collate: Callable[[list[Any]], Any] | None) -> Batched | None:
    """The data set as one that makes whole batches; None where its rows have to be collated one by one."""
    if collate is None and type(dataset) is TensorDataset:
        return Tensors(dataset)
    return dataset if isinstance(dataset, Batched) else None


_AHEAD = 1024  #: positions


class Positions:
    """A map-style data set seen along the endless shuffled sample stream.

    Indices and seeds are made for a block of positions ahead: for a few at a time, numpy's calls would cost most.
    """

    def __init__(self, dataset: Any, *, seed: int = 0, collate: Callable[[list[Any]], Any] | None = None) -> None:
        self.dataset, self.seed, self.collate = dataset, seed, collate or default_collate
        self.order = Order(n=len(dataset), seed=seed)
        self._batched = batched(dataset, collate)
        self._numbers = np.random.MT19937(0)
        self._block = range(0)
        self._indices, self._seeds = np.empty(0, np.int64), np.empty(0, np.uint64)

    def __getitems__(self, positions: range) -> Any:
        """The collated rows at `positions`; each row's random numbers follow from (seed, position) alone."""
        if not positions:
            return None
        indices, row_seeds = self._look_up(positions)
        if self._batched is not None:
            return self._batched.batch(indices, row_seeds)
        with kept_random_state(self._numbers):
            return self.collate([self._row(*pair) for pair in zip(indices.tolist(), row_seeds.tolist(), strict=True)])

    def _look_up(self, positions: range) -> tuple[Int64s, UInt64s]:
        """Indices and seeds of some positions."""
        if positions.start < self._block.start or positions.stop > self._block.stop:
            self._block = range(positions.start, max(positions.stop, positions.start + _AHEAD))
            block = np.arange(self._block.start, self._block.stop)
            self._indices, self._seeds = self.order(block)[1], seeds(self.seed, block)
        rows = slice(positions.start - self._block.start, positions.stop - self._block.start)
        return self._indices[rows], self._seeds[rows]

    def _row(self, index: int, seed: int) -> Any:
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.default_generator.manual_seed(seed)
        return self.dataset[index]


@contextmanager
def kept_random_state(numbers: np.random.MT19937) -> Iterator[None]:
    """Python's, numpy's and torch's CPU random states are afterwards what they were before.

    np.random draws from `numbers` meanwhile: its own state would take long to copy.
    """
    python, numpy, cpu = random.getstate(), mtrand.get_bit_generator(), torch.get_rng_state()
    mtrand.set_bit_generator(numbers)
    try:
        yield
    finally:
        random.setstate(python)
        mtrand.set_bit_generator(numpy)
        torch.set_rng_state(cpu)


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


def build_loader(positions: Positions, controller: Controller, world: World, spec: Loading) -> Loader:
    """The loader that a run's spec asks for."""
    if spec.workers == 0:
        return DirectLoader(positions, world.rank)
    pin = world.device.type == "cuda"
    return PrefetchingLoader(positions, world.rank, controller, workers=spec.workers, prefetch=spec.prefetch, pin=pin)


class PrefetchingLoader:
    """Worker processes load ahead, along the plans that the controller forecasts.

    The workers are torch's DataLoader's, started once. Where a forecast proves wrong (a skipped update, an adaptive
    schedule) what was drawn too far is dropped and drawn again from the true cursor.
    """

    def __init__(
        self, positions: Positions, rank: int, controller: Controller, *, workers: int, prefetch: int, pin: bool
    ) -> None:
        self._controller, self._rank, self._sampler = controller, rank, _Sampler()
        self._source = DataLoader(
            _as_dataset(positions),
            batch_sampler=self._sampler,  # pyright: ignore[reportArgumentType]
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
            rows = self._sampler.issued.popleft()
            if rows == wanted[0]:
                wanted.popleft()
                yield batch
            elif not turned:
                turned = True
                self._turn(wanted, progress, plan)

    def _turn(self, wanted: deque[range], progress: Progress, plan: Plan) -> None:
        later = _forecast(self._controller, self._rank, progress.repeat(plan.batch, 1))
        self._sampler.ahead = chain(list(wanted), later)


def _forecast(controller: Controller, rank: int, progress: Progress) -> Iterator[range]:
    """The positions of every micro-batch of `rank` to come."""
    for stride in controller.forecast(progress):
        batch, start = stride.plan.batch, stride.begin.samples
        for k in range(stride.updates):
            micro, accum, _ = controller.cut(replace(stride.begin, step=stride.begin.step + k), batch)
            yield from replace(stride.plan, micro=micro, accum=accum).rows(start + k * batch, rank)


class _Sampler:
    """An endless batch sampler that is asked for the next rows when a worker is free.

    It knows no loader: a cycle of references would leave the workers to the garbage collector.
    """

    def __init__(self) -> None:
        self.ahead: Iterator[range] = iter(())
        self.issued: deque[range] = deque()

    def __iter__(self) -> Iterator[range]:
        while True:
            self.issued.append(next(self.ahead, range(0)))
            yield self.issued[-1]


def _as_dataset(positions: Positions) -> Dataset[Any]:
    return positions  # pyright: ignore[reportReturnType]


def _outlive_sigterm(worker: int) -> None:
    """SIGTERM is for the trainer (SLURM tells all), which needs its workers for a checkpoint; its own ends a worker."""
    if not hasattr(signal, "sigwaitinfo"):  # macOS
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_when_told, args=(os.getppid(),), daemon=True).start()


def _end_when_told(trainer: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != trainer:
        pass
    os._exit(0)


def _as_is(batch: Any) -> Any:
    return batch


def evaluation_batches(
    dataset: Any, world: World, rows: int, collate: Callable[[list[Any]], Any] | None = None
) -> Iterator[tuple[Any, int]]:
    """This rank's part of a data set in its own order: collated batches of at most `rows` rows, and how many count.

    Every rank has as many batches (ZeRO 3 gathers parameters at each forward); one that has none left repeats a
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
    """This rank's share of a data set's random partition in `parts` parts, as (collated rows, how many).

    Parts differ by at most one row; part k is on the same rank whatever the seed.
    """
    n, order = len(dataset), Order(n=len(dataset), seed=seed)
    for part in range(cut(parts, world.size, world.rank), cut(parts, world.size, world.rank + 1)):
        _, indices = order(np.arange(cut(n, parts, part), cut(n, parts, part + 1)))
        yield _collated(dataset, indices, collate), len(indices)


def _collated(dataset: Any, indices: Int64s, collate: Callable[[list[Any]], Any] | None) -> Any:
    if (whole := batched(dataset, collate)) is not None:
        return whole.batch(indices, seeds(0, indices))
    with kept_random_state(np.random.MT19937(0)):
        return (collate or default_collate)([dataset[int(i)] for i in indices])
