"""Cost of a plan in seconds and worker-seconds, beside the cost on its largest number of workers throughout."""

from collections.abc import Iterator
from dataclasses import replace

from distgrow.core.errors import ConfigError
from distgrow.core.pace import Pace, Stretch, cost, fitted
from distgrow.core.progress import Progress
from distgrow.growth.controller import Controller
from distgrow.run.folder import RunFolder
from distgrow.tracking.events import Resize, Step
from distgrow.tracking.read import history, read_events


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
        raise ConfigError(f"--like {run}: {error}") from None
    return pace if resizes or given is None else pace.model_copy(update={"resize_s": given.resize_s})


def savings(controller: Controller, pace: Pace, *, soonest: bool = False) -> list[str]:
    """Return the cost as planned and, if the run is resized, the cost on its largest number of workers throughout."""
    largest = max(stretch.world for stretch in stretches(controller, soonest=soonest))
    planned = cost(pace, stretches(controller, soonest=soonest))
    held = cost(pace, (replace(stretch, world=largest) for stretch in stretches(controller, soonest=soonest)))
    rates = f"{pace.samples_per_s:,.4g} samples/s per worker, {pace.latency_s:.3g} s latency"
    lines = [
        f"at {rates}, {pace.resize_s:.3g} s a resize: {planned.seconds:,.1f} s, "
        f"{planned.worker_seconds:,.1f} worker-seconds, {planned.resizes:,} resizes"
    ]
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
