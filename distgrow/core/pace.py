"""Pace: what updates, and changes of the number of workers, cost in seconds. Plain arithmetic, fitted or given."""

import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from distgrow.core.errors import ConfigError
from distgrow.core.spec import PosFloat, Spec

Seconds = Annotated[float, Field(ge=0)]
#: Updates of one batch and world whose median counts, and how far apart rows per worker must be to tell a slope.
ENOUGH, SPREAD = 3, 1.5


class Pace(Spec):
    """How fast a run goes: an update takes latency_s + rows per worker / samples_per_s."""

    samples_per_s: PosFloat
    """Samples that one worker computes in a second."""
    latency_s: Seconds = 0.0
    """Seconds of an update that its rows do not explain: communication, the optimizer's step, logging."""
    resize_s: Seconds = 0.0
    """Seconds from asking for another number of workers until it updates, the checkpoint included."""

    def update_s(self, batch: int, world: int) -> float:
        """Return the seconds of one update. Workers beyond the batch's rows have nothing to do."""
        return self.latency_s + math.ceil(batch / world) / self.samples_per_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Stretch:
    """Hold `updates` updates of `batch` samples on `world` workers."""

    batch: int
    updates: int
    world: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Hold what a run takes."""

    seconds: float = 0.0  #: on the wall
    worker_seconds: float = 0.0  #: for which workers are held
    resizes: int = 0


def cost(pace: Pace, stretches: Iterable[Stretch]) -> Cost:
    """Return what a run takes. During a resize the larger of the two numbers of workers is paid for."""
    seconds = worker_seconds = 0.0
    resizes = before = 0
    for stretch in stretches:
        computing = stretch.updates * pace.update_s(stretch.batch, stretch.world)
        resize = pace.resize_s if before not in (0, stretch.world) else 0.0
        resizes += before not in (0, stretch.world)
        seconds += computing + resize
        worker_seconds += computing * stretch.world + resize * max(before, stretch.world)
        before = stretch.world
    return Cost(seconds=seconds, worker_seconds=worker_seconds, resizes=resizes)


def fitted(updates: Iterable[tuple[int, int, float]], resizes: Iterable[float] = ()) -> Pace:
    """Fit the pace of a run to (batch, world, seconds) of its updates and to the seconds of its resizes.

    The fit is least squares over the median of each (batch, world), so that neither a slow first update nor a hiccup
    counts. If the latency would be negative it is 0, and the slope is fitted again.

    Raises:
        ConfigError: if the updates do not determine a pace.
    """
    timed: dict[tuple[int, int], list[float]] = {}
    for batch, world, seconds in updates:
        timed.setdefault((batch, world), []).append(seconds)
    points = [
        (math.ceil(batch / world), statistics.median(each))
        for (batch, world), each in timed.items()
        if len(each) >= ENOUGH
    ]
    if not points or max(points)[0] < SPREAD * min(points)[0]:
        found = ", ".join(f"{len(each)} of {batch} on {world}" for (batch, world), each in sorted(timed.items()))
        raise ConfigError(
            f"a pace needs {ENOUGH} updates each with few and with many rows per worker ({SPREAD} times as many or "
            f"more), these are {found or 'none'}; name a run on a fixed world whose batch grew"
        )
    rows, seconds = zip(*points, strict=True)
    slope, latency = statistics.linear_regression(rows, seconds)
    if slope <= 0:
        raise ConfigError(
            "updates with more rows per worker took no longer, so that samples/s cannot be told; "
            "name a run with larger batches"
        )
    if latency < 0:
        slope, latency = statistics.linear_regression(rows, seconds, proportional=True)
    changes = list(resizes)
    return Pace(samples_per_s=1 / slope, latency_s=latency, resize_s=statistics.median(changes) if changes else 0.0)
