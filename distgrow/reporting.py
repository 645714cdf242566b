"""Reporting: the services that a run reports to, opened for it and found again on resume; knows none of them."""

import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from distgrow.run import RunFolder
from distgrow.spec import ConfigError
from distgrow.track import Event, Tracker, Trackers, history, read_events
from distgrow.trackers import Opening, TrackerSpec
from distgrow.trackers.behind import Behind
from distgrow.world import World


@contextmanager
def reporting(
    specs: Sequence[TrackerSpec], folder: RunFolder, settings: Mapping[str, Any], world: World, tracker: Tracker
) -> Iterator[Tracker]:
    """`tracker` and the services of `specs`, from the first rank. Collective.

    ConfigError where a service cannot be opened for a new run; a run that goes on does so without it, and tries again.
    """
    services: list[Behind] = []
    try:
        world.once(lambda: services.extend(_opened(specs, folder, settings, tracker) if specs else ()))
        yield Trackers([tracker, *services]) if services else tracker
    finally:
        for service in services:
            service.close()


def check(specs: Sequence[TrackerSpec], world: World) -> None:
    """ConfigError where the first rank lacks a package. Collective."""
    world.once(lambda: [spec.check() for spec in specs])


def _opened(
    specs: Sequence[TrackerSpec], folder: RunFolder, settings: Mapping[str, Any], tracker: Tracker
) -> Iterator[Behind]:
    events = read_events(folder.metrics)
    opening = Opening(folder=folder.path, settings=settings, id=_id(events, tracker))
    begun = any(event["event"] == "start" for event in events)
    for spec in specs:
        service = None
        try:
            service = spec.open(opening)
        except Exception as error:  # whatever a service's client raises
            if not begun:
                raise ConfigError(
                    f"run.trackers: {spec.kind} cannot be opened: {error}; put that right and go on with --resume, "
                    "or leave it out"
                ) from error
        behind = Behind(spec.kind, service, partial(spec.open, opening))
        for event in history(events):
            behind.log(event)  # what a crash kept from the service
        yield behind


def _id(events: Sequence[Event], tracker: Tracker) -> str:
    """By which services find the run again: an event of metrics.jsonl, which is kept wherever checkpoints are."""
    known = [event["id"] for event in events if event["event"] == "tracker"]
    if known:
        return known[-1]
    event = {"event": "tracker", "step": 0, "samples": 0, "sfo": 0, "time_s": 0.0, "id": secrets.token_hex(8)}
    tracker.log(event)
    return event["id"]
