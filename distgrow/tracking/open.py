"""Opens the trackers of a run, and finds its services again on resume."""

import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from distgrow.core.errors import ConfigError
from distgrow.core.progress import Progress
from distgrow.distributed.world import World
from distgrow.growth.controller import Controller
from distgrow.run.folder import RunFolder
from distgrow.tracking.background import BackgroundTracker
from distgrow.tracking.base import Tracker, Trackers
from distgrow.tracking.base_event import Event
from distgrow.tracking.events import ServiceId, Start
from distgrow.tracking.jsonl import JSONL
from distgrow.tracking.rate_events import RateChoice, RateTrial
from distgrow.tracking.read import history, read_events
from distgrow.tracking.spec import Opening, TrackerSpec
from distgrow.tracking.tensorboard import tensorboard
from distgrow.tracking.terminal import Terminal


@contextmanager
def tracking(folder: RunFolder, rank: int, controller: Controller, others: Iterable[Tracker] = ()) -> Iterator[Tracker]:
    """Open all trackers and `others` on the first rank, none elsewhere.

    How lr.base=auto was measured is in metrics.jsonl by then, and was printed. The other trackers get it first.
    """
    board = [tensorboard(folder.tensorboard), *others] if rank == 0 else []
    tracker = Trackers([*_trackers(folder, controller), *board] if rank == 0 else [])
    try:
        for event in _measured_before(folder) if rank == 0 else ():
            Trackers(board).log(event.to_json())
        yield tracker
    finally:
        tracker.close()


def _trackers(folder: RunFolder, controller: Controller) -> list[Tracker]:
    """Return the trackers that every run has; growth that measures does not know its updates beforehand."""
    planned = list(controller.outline(Progress()))
    samples, updates = (sum(batch * count for _, batch, count in planned), sum(count for _, _, count in planned))
    known = None if controller.growth.adaptive else updates
    return [JSONL(folder.metrics), Terminal(samples, known)]


def _measured_before(folder: RunFolder) -> list[Event]:
    """Return how the first learning rate was measured; nothing if the run has begun since."""
    found: list[Event] = []
    for event in read_events(folder.metrics):
        if isinstance(event, Start):
            return []
        if isinstance(event, RateTrial | RateChoice):
            found.append(event)
    return found


@contextmanager
def reporting(
    specs: Sequence[TrackerSpec], folder: RunFolder, settings: Mapping[str, Any], world: World, tracker: Tracker
) -> Iterator[Tracker]:
    """Open `tracker` and the services of `specs`, from the first rank. Collective.

    A run that goes on does not wait for its services.

    Raises:
        ConfigError: a service cannot be opened for a new run.
    """
    services: list[BackgroundTracker] = []
    try:
        world.on_rank0(lambda: services.extend(_opened(specs, folder, settings, tracker) if specs else ()))
        yield Trackers([tracker, *services]) if services else tracker
    finally:
        for service in services:
            service.close()


def check(specs: Sequence[TrackerSpec], world: World) -> None:
    """Raise ConfigError if the first rank lacks a package. Collective."""
    world.on_rank0(lambda: [spec.check() for spec in specs])


def _opened(
    specs: Sequence[TrackerSpec], folder: RunFolder, settings: Mapping[str, Any], tracker: Tracker
) -> Iterator[BackgroundTracker]:
    events = history(read_events(folder.metrics))
    opening = Opening(folder=folder.path, settings=settings, id=_id(events, tracker))
    begun = any(isinstance(event, Start) for event in events)
    for spec in specs:
        service = BackgroundTracker(spec.kind, partial(spec.open, opening), (event.to_json() for event in events))
        if not begun and (reason := service.opened()) is not None:
            raise ConfigError(
                f"run.trackers: {spec.kind} cannot be opened: {reason}; put that right and go on with --resume, "
                "or leave it out"
            )
        yield service


def _id(events: Sequence[Event], tracker: Tracker) -> str:
    """Return the id by which services find the run again; metrics.jsonl, kept wherever checkpoints are, holds it."""
    known = [event.id for event in events if isinstance(event, ServiceId)]
    if known:
        return known[-1]
    last = events[-1] if events else Start(step=0, samples=0, sfo=0, time_s=0)
    event = ServiceId(step=last.step, samples=last.samples, sfo=last.sfo, time_s=last.time_s, id=secrets.token_hex(8))
    tracker.log(event.to_json())
    return event.id
