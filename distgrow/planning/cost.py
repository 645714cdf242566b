"""Cost of a plan in seconds and worker-seconds, beside the cost on its largest number of workers throughout."""

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import replace

from distgrow.config.run import Run
from distgrow.core.counted import counted, shown
from distgrow.core.errors import ConfigError
from distgrow.core.pace import Pace, Stretch, cost, fitted
from distgrow.core.progress import Progress
from distgrow.growth.controller import Controller
from distgrow.growth.objective import Aimed, Objective
from distgrow.run.folder import RunFolder
from distgrow.theory.noise import fastest_batch, half_batch, steps_overhead, time_to_progress
from distgrow.tracking.events import Resize, Step
from distgrow.tracking.read import history, read_events

NO_OBJECTIVE = "no growth.objective follows from --like"


def stretches(controller: Controller, *, soonest: bool = False) -> Iterator[Stretch]:
    """Yield the stages of the run, each on the number of ranks that it wants. `soonest` is as in Controller.outline."""
    for stage, batch, updates in controller.outline(Progress(), soonest=soonest):
        yield Stretch(batch=batch, updates=updates, world=controller.ranks(stage))


def measured(run: str, given: Pace | None = None) -> Pace:
    """Return the pace of an earlier run, from its metrics.jsonl.

    Args:
        run: Folder of the run.
        given: The pace of the config. Its seconds of a resize are used if the run had none.

    Raises:
        ConfigError: if there is no such run, or if its updates are too few or too alike to fit a pace.
    """
    folder = RunFolder(run)
    if not folder.metrics.is_file():
        raise ConfigError(f"--like {run}: {folder.metrics} does not exist; name the run.dir of a run that has begun")
    try:
        events = history(read_events(folder.metrics))
        steps = [event for event in events if isinstance(event, Step) and event.world and event.samples_per_s]
        updates = [
            (step.batch, step.world or 1, (step.drawn or step.batch) / (step.samples_per_s or 1)) for step in steps
        ]
        resizes = [event.seconds for event in events if isinstance(event, Resize) and event.seconds is not None]
        pace = fitted(updates, resizes)
    except ConfigError as error:
        raise ConfigError(f"--like {run}: {error}, or give launch.pace") from None
    return pace if resizes or given is None else pace.model_copy(update={"resize_s": given.resize_s})


def pace_and_scale(run: Run, like: str | None) -> tuple[Pace | None, float | None]:
    """Return the pace and the noise scale: those of the run folder `like`, or of the config; None: not known.

    In a config, launch.pace and theory come before growth.objective.

    Raises:
        ConfigError: as in `measured`.
    """
    if like is not None:
        return measured(like, run.launch.pace), measured_scale(like)
    aim, theory = objective_of(run), run.theory
    pace, scale = (None, None) if aim is None else (aim.pace, aim.scale)
    return run.launch.pace or pace, scale if theory is None else theory.noise_scale


def costed_world(run: Run, world: int | None, pace: Pace | None) -> int | None:
    """Return the number of workers that costs are shown for: the objective's if the pace is, else `world`."""
    aim = objective_of(run)
    return aim.workers if world is None and aim is not None and pace == aim.pace else world


def objective_of(run: Run) -> Objective | None:
    """Return the objective that growth follows from; None: there is none."""
    return run.growth.objective if isinstance(run.growth, Aimed) else None


def measured_scale(run: str, first: float = 0.5, last: float = 1.0) -> float | None:
    """Return the noise scale of an earlier run, the median over a part of its samples; None: it was not measured.

    Args:
        run: Folder of the run.
        first: Where the part begins, of all samples. Default: the second half.
        last: Where it ends.
    """
    steps = [event for event in history(read_events(RunFolder(run).metrics)) if isinstance(event, Step)]
    total = steps[-1].samples if steps else 0
    part = [step.noise_scale for step in steps if first * total <= step.samples <= last * total]
    scales = [scale for scale in part if scale and scale > 0]
    return statistics.median(scales) if scales else None


def as_objective(run: Run, controller: Controller, pace: Pace, like: str) -> list[str]:
    """Return the measurements of an earlier run as a growth.objective, or why not; nothing if growth takes none.

    The noise scales are medians over the first and over the last quarter of its samples. The workers are the plan's,
    and `most` is that of the objective which growth has, if it has one.
    """
    if not isinstance(run.growth, Aimed):
        return []
    first, last = measured_scale(like, 0, 0.25), measured_scale(like, 0.75)
    if pace.latency_s == 0:
        return [f"{NO_OBJECTIVE}: its updates show no latency, so small batches take the least time"]
    if not (first and last):
        part = "last" if first else "first"
        return [
            f"{NO_OBJECTIVE}: {like} has no noise scale in the {part} quarter of its samples, as none is measured "
            "where an update has one micro-batch on one rank; lower its engine.max_micro, or give noise by hand"
        ]
    workers = max(stretch.world for stretch in stretches(controller, soonest=True))
    ends = {"noise": first, "noise_at_end": last} if last >= first else {"noise": math.sqrt(first * last)}
    numbers = {**ends, "latency_s": pace.latency_s, "samples_per_s": pace.samples_per_s}
    given = ", ".join(f"{key}: {_in_four_digits(number)}" for key, number in numbers.items())
    if (aim := run.growth.objective) is not None and aim.most is not None:
        given += f", most: {aim.most}"
    return [f"as an objective: growth.objective: {{workers: {workers}, {given}}}"]


def _in_four_digits(number: float) -> str:
    """Return a number as YAML reads it, which takes 1e+05 for a string."""
    return str(float(f"{number:.4g}")).removesuffix(".0")


def fastest(controller: Controller, pace: Pace, scale: float | None, *, soonest: bool = False) -> list[str]:
    """Return the batch at which half of an update is overhead and, if B is known, the fastest one, for each world.

    Args:
        controller: The decisions of the run.
        pace: Speed of a worker.
        scale: B, the noise scale. None: it is not known.
        soonest: As in Controller.outline.
    """
    if pace.latency_s == 0:
        return []
    parts = list(stretches(controller, soonest=soonest))
    worlds = sorted({stretch.world for stretch in parts})
    halves = [f"{half_batch(pace.latency_s, world * pace.samples_per_s):,.0f} on {world:,}" for world in worlds]
    line = f"half of an update is latency at a batch of {', '.join(halves)} worker{'s' * (worlds != [1])}"
    if scale is None:
        return [line]
    return [
        line,
        *(_fastest_on(world, pace, scale, [part for part in parts if part.world == world]) for world in worlds),
    ]


def _fastest_on(world: int, pace: Pace, scale: float, parts: Sequence[Stretch]) -> str:
    """Return the fastest batch on so many workers, and the time of `parts` over that of the same progress at it."""
    latency, rate = pace.latency_s, world * pace.samples_per_s
    best = fastest_batch(latency, rate, scale)
    made = math.fsum(part.updates / steps_overhead(part.batch, scale) for part in parts)
    spent = math.fsum(part.updates * pace.update_s(part.batch, world) for part in parts)
    return (
        f"at a noise scale of {scale:,.0f}, progress on {counted(world, 'worker')} is fastest at a batch of "
        f"{best:,.0f}; its stages take {spent / made / time_to_progress(best, latency, rate, scale):.2f} × as long"
    )


def savings(controller: Controller, pace: Pace, price: float | None = None, *, soonest: bool = False) -> list[str]:
    """Return the cost as planned and, if the run is resized, the cost on its largest number of workers throughout."""
    largest = max(stretch.world for stretch in stretches(controller, soonest=soonest))
    planned = cost(pace, stretches(controller, soonest=soonest))
    held = cost(pace, (replace(stretch, world=largest) for stretch in stretches(controller, soonest=soonest)))
    rates = f"{pace.samples_per_s:,.4g} samples/s per worker, {pace.latency_s:.3g} s latency"
    lines = [
        f"at {rates}, {pace.resize_s:.3g} s a resize: {shown(planned.seconds, 1)} s, "
        f"{shown(planned.worker_seconds, 1)} worker-seconds, {counted(planned.resizes, 'resize')}"
    ]
    if price is not None:
        paid = planned.worker_seconds / 3600 * price
        lines.append(f"at {price:,.4g} a worker and hour: {shown(paid, 2)}")
    if planned.resizes and pace.resize_s == 0:
        lines.append("a resize is taken as 0 s, as none was measured: say launch.pace.resize_s")
    if planned.resizes:
        saved = held.worker_seconds - planned.worker_seconds
        verb, longer = ("saved" if saved >= 0 else "lost"), planned.seconds - held.seconds
        lines.append(
            f"on {largest:,} workers throughout: {held.seconds:,.1f} s, {held.worker_seconds:,.1f} worker-seconds; "
            f"{verb}: {abs(saved):,.1f} worker-seconds ({abs(saved) / held.worker_seconds:.1%}) "
            f"for {abs(longer):,.1f} s {'more' if longer >= 0 else 'less'}"
        )
    return lines
