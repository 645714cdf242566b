"""Loader: draws exactly the rows of a plan, prefetching ahead of the cursor; knows nothing of why a plan is so."""

import math
import os
import shutil
import signal
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader, Dataset

from distgrow.core.errors import ConfigError, TrainingFailed
from distgrow.core.plan import Plan
from distgrow.core.progress import Progress
from distgrow.data.iterable import IterableStream, State
from distgrow.data.spec import Loading
from distgrow.data.stream import SampledStream, Stream, micro_batches
from distgrow.distributed.world import World
from distgrow.growth.controller import Controller
from distgrow.growth.draws import draws_size
from distgrow.run.stop import leave_stopping_to_the_trainer

#: What torch says if loader processes find no room in shared memory.
_NO_SHARED_MEMORY = ("shared memory", "No space left on device", "Bus error")


class Loader(Protocol):
    """Draw the micro-batches of updates."""

    def draw(self, progress: Progress, plan: Plan) -> Iterator[Any]:
        """Yield this rank's micro-batches of the update that `plan` describes."""
        ...

    def state(self) -> State | None:
        """Return the state of an iterable data set after the last micro-batch that was drawn, if that is known."""
        ...


class DirectLoader:
    """Load in this process, when asked."""

    def __init__(self, positions: Stream, rank: int) -> None:
        self._positions, self._rank = positions, rank
        self._sampled = isinstance(positions, SampledStream)

    def draw(self, progress: Progress, plan: Plan) -> Iterator[Any]:
        """See Loader."""
        parts = micro_batches(plan, progress.samples, self._rank, sampled=self._sampled)
        return map(self._positions.__getitems__, parts)

    def state(self) -> State | None:
        """See Loader."""
        return self._positions.state() if isinstance(self._positions, IterableStream) else None


def build_loader(positions: Stream, controller: Controller, world: World, spec: Loading) -> Loader:
    """Return the loader that a run's spec asks for."""
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
        self, positions: Stream, rank: int, controller: Controller, *, workers: int, prefetch: int, pin: bool
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
            worker_init_fn=outlive_signals,
            generator=torch.Generator().manual_seed(positions.seed),
        )
        self._stream: Iterator[Any] | None = None
        self._with_state, self._state = isinstance(positions, IterableStream), None
        self._sampled = isinstance(positions, SampledStream)

    def draw(self, progress: Progress, plan: Plan) -> Iterator[Any]:
        """See Loader."""
        wanted = deque(micro_batches(plan, progress.samples, self._rank, sampled=self._sampled))
        turned = self._stream is None
        if self._stream is None:
            self._turn(wanted, progress, plan)
            self._stream = iter(self._source)
        while wanted:
            batch = self._next(self._stream, plan)
            rows = self._sampler.issued.popleft()
            if rows == wanted[0]:
                wanted.popleft()
                if self._with_state:
                    batch, self._state = batch
                yield batch
            elif not turned:
                turned = True
                self._turn(wanted, progress, plan)

    def state(self) -> State | None:
        """See Loader."""
        return self._state

    def _next(self, stream: Iterator[Any], plan: Plan) -> Any:
        """Return the next micro-batch.

        Raises:
            TrainingFailed: Shared memory does not hold what loader processes have drawn ahead.
        """
        rows = max([plan.micro, *map(len, self._sampler.issued)])
        workers, prefetch = self._source.num_workers, self._source.prefetch_factor
        with shared_memory_told(
            f"the micro-batches of up to {rows} rows that run.loader.workers={workers} draw ahead, "
            f"run.loader.prefetch={prefetch} each; lower one of them or engine.max_micro and go on with --resume"
        ):
            batch = next(stream)
        if isinstance(batch, _Refusal):
            raise batch.error
        return batch

    def _turn(self, wanted: deque[Sequence[int]], progress: Progress, plan: Plan) -> None:
        later = _forecast(self._controller, self._rank, progress.repeat(plan.batch, 1), sampled=self._sampled)
        self._sampler.ahead = chain(list(wanted), later)


@contextmanager
def shared_memory_told(what: str) -> Iterator[None]:
    """Raise TrainingFailed if /dev/shm does not hold what loader processes have drawn: `what`, and a way out."""
    try:
        yield
    except (RuntimeError, OSError) as error:
        if not any(words in str(error) for words in _NO_SHARED_MEMORY):
            raise
        size = shutil.disk_usage("/dev/shm").total / 2**20 if Path("/dev/shm").exists() else math.nan
        raise TrainingFailed(
            f"/dev/shm ({size:,.1f} MiB) does not hold {what}; or enlarge it (docker run --shm-size=8g)"
        ) from error


def _forecast(controller: Controller, rank: int, progress: Progress, *, sampled: bool) -> Iterator[Sequence[int]]:
    """Yield the positions of every micro-batch of `rank` to come."""
    if draws_size(controller.sampling):
        yield from _drawn_forecast(controller, rank, progress)
        return
    for stride in controller.forecast(progress):
        batch, start = stride.plan.batch, stride.begin.samples
        for k in range(stride.updates):
            progress = replace(stride.begin, step=stride.begin.step + k)
            micro, accum = controller.split(progress, batch, controller.noise_window(progress, batch))
            plan = replace(stride.plan, micro=micro, accum=accum)
            yield from micro_batches(plan, start + k * batch, rank, sampled=sampled)


def _drawn_forecast(controller: Controller, rank: int, progress: Progress) -> Iterator[Sequence[int]]:
    """Do as `_forecast` where the number of rows is drawn anew for each update."""
    while not controller.done(progress):
        progress = controller.advance(progress)
        if controller.hands_over(progress.stage):
            return
        plan = controller.plan(progress)
        yield from micro_batches(plan, progress.samples, rank, sampled=True)
        progress = progress.repeat(plan.batch, 1)


class _Sampler:
    """Sample batches without end. It is asked for the next rows when a worker is free.

    It knows no loader: a cycle of references would leave the workers to the garbage collector.
    """

    def __init__(self) -> None:
        self.ahead: Iterator[Sequence[int]] = iter(())
        self.issued: deque[Sequence[int]] = deque()

    def __iter__(self) -> Iterator[Sequence[int]]:
        while True:
            self.issued.append(next(self.ahead, range(0)))
            yield self.issued[-1]


class _Refusal:
    """Hold an error about data or settings. Torch would show it with a loader process's traceback."""

    def __init__(self, error: Exception) -> None:
        self.error = error


class _Told:
    """Return a batch, of an iterable data set with its state; or what goes wrong with the data."""

    def __init__(self, positions: Stream) -> None:
        self._positions = positions

    def __getitems__(self, positions: Sequence[int]) -> Any:
        try:
            batch = self._positions.__getitems__(positions)
            return (batch, self._positions.state()) if isinstance(self._positions, IterableStream) else batch
        except (ConfigError, TrainingFailed) as error:
            return _Refusal(error)


def _as_dataset(positions: Stream) -> Dataset[Any]:
    return _Told(positions)  # pyright: ignore[reportReturnType]


def outlive_signals(worker: int) -> None:
    """Ignore signals that stop the run, and SIGTERM unless the trainer sent it, which needs its workers till then."""
    leave_stopping_to_the_trainer()
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
