"""Outline of a run: the batches and updates of its stages by arithmetic alone, and what makes a batch impossible."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from distgrow.core.budget import Budget
from distgrow.core.counted import counted
from distgrow.core.errors import ConfigError
from distgrow.core.plan import Plan, split
from distgrow.core.progress import Progress
from distgrow.core.stages import Trigger, stage_at
from distgrow.growth.answers import checked_batch
from distgrow.growth.base import GrowthPolicy

#: Stages that a run may have; an outline goes through all of them.
MOST_STAGES = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Stride:
    """Hold equal updates in a row: `updates` of `plan` from `begin` on. Only the learning rate may decay in it."""

    begin: Progress
    plan: Plan
    updates: int

    @property
    def end(self) -> Progress:
        """Return the progress after the last update."""
        return self.begin.repeat(self.plan.batch, self.updates)


def outline(
    growth: GrowthPolicy, trigger: Trigger, budget: Budget, epoch: int, progress: Progress, *, whole: bool = False
) -> Iterator[tuple[int, int, int]]:
    """Yield (stage, batch, updates) of the run to come if no update is skipped.

    Args:
        growth: The policy.
        trigger: Where stages end.
        budget: Where the run ends.
        epoch: Samples of one pass over the training set.
        progress: Where the outline begins.
        whole: Whether no batch is shortened, and the last update may go beyond the budget.

    Raises:
        ConfigError: The run would have more than MOST_STAGES stages.
    """
    left, start, last = budget.planned(progress, epoch), growth.start, growth.last_stage
    stage, step, applied, batch = progress.stage, progress.step, progress.ledger.applied, 0
    by_steps, last_step, furthest = trigger.axis == "steps", budget.steps or math.inf, stage + MOST_STAGES
    while left > 0 and step < last_step:
        if stage > furthest:
            raise ConfigError(
                f"the run would have more than {MOST_STAGES:,} stages (batch={batch} at stage {stage}); set "
                "growth.cap, lengthen the stages, raise growth.factor or growth.increment, or lower the budget"
            )
        stage = stage_at(trigger, stage, step if by_steps else applied, last)
        batch = checked_batch(growth, stage)
        batch = batch if whole else shorten(batch, left, start)
        spared = batch - 1 if whole else -min(start, batch)  # of the budget, for the last update
        updates = last_step - step if math.isinf(left) else max(1, (left + spared) // batch)
        if stage < last and (end := trigger.end(stage)) < math.inf:
            updates = min(updates, end - step if by_steps else -((applied - end) // batch))
        yield stage, batch, int(updates)
        step, applied, left = step + int(updates), applied + batch * int(updates), left - batch * updates


def shorten(batch: int, left: float, start: int) -> int:
    """Return the samples of the next update: the policy's batch, or what is left of the budget.

    A remainder smaller than `start` joins the update before it, so that no batch falls below `start` (unless the policy
    or the whole budget does), whatever the world size.
    """
    return batch if left >= batch + min(start, batch) else int(left)


def problems(growth: GrowthPolicy, stage: int, batch: int, *, epoch: int, world: int, max_micro: int) -> list[str]:
    """Return what keeps a batch of a stage from being drawn or split.

    Args:
        growth: The policy.
        stage: The stage.
        batch: Samples of the batch, which may be a shortened last one.
        epoch: Samples of one pass over the training set.
        world: Ranks at the stage.
        max_micro: Rows of a micro-batch, at most.
    """
    if world <= batch <= epoch and growth.start <= epoch and max_micro > 1:
        return []
    out = growth.fits(epoch)
    if growth.start > epoch:
        rows = counted(str(epoch), "sample")
        return [f"growth.start={growth.start} exceeds the {rows} of the training set; {out or 'lower it'}"]
    found: list[str] = []
    target = growth.stage_batch(stage)
    if min(batch, target) > epoch:
        found.append(
            f"batch={batch} of stage {stage} exceeds the {counted(str(epoch), 'sample')} of the training set; "
            + (out or f"set growth.cap (or growth.start) to at most {epoch}, or shorten the budget")
        )
    if batch < min(world, target):
        found.append(
            f"the budget ends with a batch of {batch}, fewer than the {world} ranks; "
            "raise budget or lower launch.workers"
        )
        return found
    try:
        split(batch, world, max_micro)
    except ValueError as error:
        found.append(f"stage {stage}: {error}")
    return found
