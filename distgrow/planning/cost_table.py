"""Tables of seconds, worker-seconds and prices: at constant batches around the fastest one, and along the schedule."""

import math
from collections.abc import Sequence

from distgrow.core.counted import counted, shown
from distgrow.core.errors import ConfigError
from distgrow.core.pace import Pace, Stretch
from distgrow.growth.controller import Controller
from distgrow.planning.cost import stretches
from distgrow.theory.noise import fastest_batch, steps_overhead, time_to_progress

HOUR = 3600
#: Multiples of the fastest batch that are shown.
AROUND = (0.25, 0.5, 1.0, 2.0, 4.0)


def checked_price(price: float | None, pace: Pace | None) -> float | None:
    """Return the price of a worker for an hour, in any currency.

    Raises:
        ConfigError: It is none, or there are no seconds to multiply it by.
    """
    if price is None:
        return None
    if not 0 < price < math.inf:
        raise ConfigError(f"--price={price:g} must be a number above 0, of a worker for an hour")
    if pace is None:
        raise ConfigError(
            f"--price={price:g} is of a worker for an hour, and no pace is known: give --like RUN, launch.pace or "
            "growth.objective"
        )
    return price


def constant_batches(
    controller: Controller, pace: Pace, scale: float | None, price: float | None = None, *, soonest: bool = False
) -> list[str]:
    """Return what the plan's progress would cost at constant batches around the fastest one, on its most workers.

    An update of b samples makes the progress 1/(1 + B/b) of one without noise, at the best rate for each batch. The
    last line is the plan itself.

    Args:
        controller: The decisions of the run.
        pace: Speed of a worker.
        scale: B, the noise scale. None: it is not known, and nothing is said.
        price: Of a worker for an hour. None: no prices are shown.
        soonest: As in Controller.outline.
    """
    if pace.latency_s == 0 or scale is None:
        return []
    parts = list(stretches(controller, soonest=soonest))
    world = max(part.world for part in parts)
    made = math.fsum(part.updates / steps_overhead(part.batch, scale) for part in parts)
    best = fastest_batch(pace.latency_s, world * pace.samples_per_s, scale)
    rows: list[Sequence[str]] = [["batch", *_headings(price), "updates", "evaluations"]]
    for batch in sorted({max(1, round(best * factor / world)) * world for factor in AROUND}):
        updates = made * steps_overhead(batch, scale)
        seconds = updates * pace.update_s(batch, world)
        spent = _spent(seconds, world * seconds, price)
        rows.append([f"{batch:,}", *spent, f"{updates:,.0f}", f"{updates * batch:,.0f}"])
    count, evaluations = sum(part.updates for part in parts), sum(part.updates * part.batch for part in parts)
    rows.append(["plan", *_along(pace, parts, price), f"{count:,}", f"{evaluations:,}"])
    head = f"the same progress at constant batches on {counted(world, 'worker')}, each at its best rate:"
    return [head, *_aligned(rows)]


def by_stage(
    controller: Controller, pace: Pace, scale: float | None, price: float | None, most: int, *, soonest: bool = False
) -> list[str]:
    """Return what each stage costs and, if B is known, its time for its progress over that at the fastest batch.

    Args:
        controller: The decisions of the run.
        pace: Speed of a worker.
        scale: B, the noise scale. None: it is not known.
        price: Of a worker for an hour. None: no prices are shown.
        most: Stages that are shown, the first ones.
        soonest: As in Controller.outline.
    """
    parts = list(stretches(controller, soonest=soonest))
    compared = scale is not None and pace.latency_s > 0
    rows: list[Sequence[str]] = [["batch", "workers", *_headings(price), *["÷ fastest"] * compared]]
    for part in parts[:most]:
        spent = _along(pace, [part], price)
        slower = [_slower(pace, scale, part)] if scale is not None and pace.latency_s > 0 else []
        rows.append([f"{part.batch:,}", f"{part.world:,}", *spent, *slower])
    hidden = [f"  … {len(parts) - most:,} more"] * (len(parts) > most)
    return ["along the schedule:", *_aligned(rows), *hidden]


def _slower(pace: Pace, scale: float, part: Stretch) -> str:
    """Return the time of a stage for its progress over the least."""
    latency, rate = pace.latency_s, part.world * pace.samples_per_s
    least = time_to_progress(fastest_batch(latency, rate, scale), latency, rate, scale)
    return f"{pace.update_s(part.batch, part.world) * steps_overhead(part.batch, scale) / least:.2f}"


def _along(pace: Pace, parts: Sequence[Stretch], price: float | None) -> list[str]:
    """Return what stages take, resizes left out."""
    seconds = [part.updates * pace.update_s(part.batch, part.world) for part in parts]
    held = [each * part.world for each, part in zip(seconds, parts, strict=True)]
    return _spent(math.fsum(seconds), math.fsum(held), price)


def _headings(price: float | None) -> list[str]:
    return ["seconds", "worker-seconds", *["price"] * (price is not None)]


def _spent(seconds: float, worker_seconds: float, price: float | None) -> list[str]:
    money = [] if price is None else [shown(worker_seconds / HOUR * price, 2)]
    return [shown(seconds, 1), shown(worker_seconds, 1), *money]


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return rows as lines, each column to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  " + "  ".join(map(str.rjust, row, widths)) for row in rows]
