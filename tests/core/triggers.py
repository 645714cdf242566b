"""Triggers as the boundaries that they set."""

from distgrow.core.stages import Trigger


def ends(trigger: Trigger, count: int) -> list[float]:
    """The first `count` boundaries."""
    return [trigger.end(stage) for stage in range(count)]
