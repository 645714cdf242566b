"""What is checked before another trainer makes the updates of a schedule; knows no trainer."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from distgrow.core.counted import counted
from distgrow.core.errors import ConfigError
from distgrow.distributed.world import World
from distgrow.growth.controller import Controller
from distgrow.growth.draws import draws_size


def check_names(rows: Mapping[str, Any], known: type) -> None:
    """Raise TypeError if a keyword is not `known`, as Python does for arguments that are written out."""
    if unknown := rows.keys() - known.__annotations__.keys():
        raise TypeError(f"unknown keyword {min(unknown)!r}; allowed: {', '.join(known.__annotations__)}")


def count_items(items: Callable[[Any], int], batch: Any) -> int:
    """Return what a micro-batch's loss is a mean over.

    Raises:
        ConfigError: It is negative.
    """
    count = int(items(batch))
    if count < 0:
        raise ConfigError(f"items gave {count} for a micro-batch; it must count what the loss is a mean over")
    return count


def on_world(controller: Controller, world: World) -> Controller:
    """Return the controller for the trainer's ranks.

    Raises:
        ConfigError: It is meant for others, or its growth goes by measurements.
    """
    growth = controller.growth
    if growth.needs:
        raise ConfigError(
            f"growth.kind={growth.name} goes by what distgrow's engines measure of each update, which other trainers "
            "do not show; choose a growth that follows a schedule, or train with distgrow.fit"
        )
    if controller.at_growth.changes:
        raise ConfigError(
            "the controller's at_growth changes settings of the optimizer, which belongs to the trainer; leave it out, "
            "or train with distgrow.fit"
        )
    if controller.average is not None:
        raise ConfigError(
            "the controller's average is kept by distgrow's engines alone; leave it out, or train with distgrow.fit"
        )
    if controller.active is not None:
        raise ConfigError(
            "the controller's active experts are given to a model by distgrow's engines alone; leave active out"
        )
    if controller.sparsity is not None:
        raise ConfigError(
            "the controller's sparsity prunes a model that distgrow's engines train; leave it out, or train with "
            "distgrow.fit"
        )
    if controller.budget.tokens is not None:
        raise ConfigError(
            f"budget.tokens={controller.budget.tokens}: another trainer does not count tokens; give the budget in "
            "samples, epochs or steps, or train with distgrow.fit"
        )
    if controller.group is not None:
        raise ConfigError("the controller's group changes the number of ranks, which other trainers cannot; leave it")
    if controller.world not in (1, world.size):
        raise ConfigError(
            f"the controller is for world={controller.world}, but the trainer has {counted(world.size, 'rank')}; leave "
            "world out"
        )
    return replace(controller, world=world.size)


def check_rows(dataset: Any, controller: Controller) -> None:
    """Raise ConfigError if the schedule is for another number of samples, or updates have any number of them."""
    if draws_size(controller.sampling):
        raise ConfigError(
            "the controller's sampling draws updates of any size, which other trainers divide by their own size; use "
            "sampling.kind=nice, or train with distgrow.fit"
        )
    if len(dataset) != controller.epoch:
        raise ConfigError(
            f"the training set has {counted(str(len(dataset)), 'sample')}, but the controller was made for "
            f"epoch={controller.epoch}; give it epoch={len(dataset)}"
        )


def check_rate(groups: Sequence[dict[str, Any]], base: float) -> None:
    """Raise ConfigError if the optimizer of a new run has a learning rate that is neither the controller's nor 0."""
    rates = {float(group["lr"]) for group in groups if "lr_scale" not in group}
    if rates - {0.0, base}:
        raise ConfigError(
            f"the optimizer has lr={max(rates):g}, but the controller's lr.base is {base:g}, which would replace it; "
            "give it lr=0.0, or the same"
        )


def check_groups(groups: Sequence[dict[str, Any]]) -> None:
    """Raise ConfigError if parameter groups have learning rates of their own, which the plan's would replace."""
    rates = {float(group["lr"]) for group in groups if "lr_scale" not in group}
    if len(rates) > 1:
        raise ConfigError(
            f"the optimizer's parameter groups have the learning rates {sorted(rates)}, but the plan gives one; "
            'say how they differ by a factor in the group, "lr_scale": 0.1'
        )
