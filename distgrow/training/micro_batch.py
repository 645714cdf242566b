"""Memory: the largest micro-batch that every rank holds, found by probes, and whether a run can be cut into it."""

from dataclasses import replace

from distgrow.core.counted import counted
from distgrow.core.errors import ConfigError, TrainingFailed
from distgrow.core.plan import largest
from distgrow.core.progress import Progress
from distgrow.data.loader import Loader
from distgrow.engine.batches import MORE_MEMORY
from distgrow.engine.protocol import Engine
from distgrow.growth.controller import Controller
from distgrow.tracking.event_log import EventLog
from distgrow.tracking.events import MemoryProbe


def measured(controller: Controller, engine: Engine, loader: Loader, progress: Progress, events: EventLog) -> Progress:
    """Find the largest micro-batch that the run needs and every rank holds. Return the progress with it and the probes.

    Each probe is logged as an event. If memory holds whole shares, no limit is set. Collective: every rank must call.

    Raises:
        TrainingFailed: if memory holds too little.
    """

    def fits(micro: int) -> bool:
        nonlocal progress
        plan = controller.trial(micro)
        outcome = engine.update(plan, loader.draw(Progress(), plan))
        progress = progress.after(plan, outcome)
        events.log(MemoryProbe(**events.place(progress), micro=micro, fits=not outcome.out_of_memory))
        return not outcome.out_of_memory

    needed = controller.largest_share(progress)
    found = largest(fits, controller.plan(progress).micro, needed)
    limited = replace(progress, micro_limit=found if found < needed else controller.max_micro)
    check_split(controller, limited)
    return limited


def check_split(controller: Controller, progress: Progress) -> None:
    """TrainingFailed where the run's batches cannot be cut into the micro-batches that memory holds."""
    limit = progress.micro_limit
    assert limit is not None
    try:
        replace(controller, max_micro=min(limit, controller.max_micro)).check(progress)
    except ConfigError:
        if limit == 0:
            raise TrainingFailed(f"a rank's memory does not hold a micro-batch of one row; {MORE_MEMORY}") from None
        raise TrainingFailed(
            f"a rank's memory holds micro-batches of {counted(limit, 'row')}, into which this run's batches on "
            f"{counted(controller.world, 'rank')} cannot be cut; {MORE_MEMORY}, or let growth and budget give "
            f"multiples of {controller.world}"
        ) from None
