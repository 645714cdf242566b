"""The check of a task before training: its loss must be a mean over rows or items, and what else a few rows show."""

from collections.abc import Sequence
from typing import Any

import torch

from distgrow.core.errors import ConfigError
from distgrow.data.dataset import is_stream, size_of
from distgrow.data.stream import open_stream
from distgrow.distributed.world import World
from distgrow.engine.ability import Can
from distgrow.engine.mean_check import check_mean_over_rows
from distgrow.engine.objective import on_meta
from distgrow.engine.trial_rows import ROWS
from distgrow.growth.base import GrowthPolicy, Measure
from distgrow.growth.controller import Controller
from distgrow.run.folder import RunFolder
from distgrow.tasks.task import Task
from distgrow.training.evaluation_hooks import watched
from distgrow.training.first_rows import check_first_rows
from distgrow.training.settings import Settings


def check_loss(
    task: Task,
    controller: Controller,
    folder: RunFolder,
    world: World,
    settings: Settings | None = None,
    hooks: Sequence[Any] = (),
) -> None:
    """Check that the loss is a mean over rows or items, and what else a few rows show, if no run has begun in `folder`.

    Collective: every rank must call.

    The first rank makes a few forward passes and no backward pass: the ledger counts nothing.

    Args:
        task: Model, loss and data.
        controller: Gives the growth policy, the seed and the largest micro-batch.
        folder: The run's folder.
        world: The ranks.
        settings: If the engine cuts the model, that stays on the CPU here; on the meta device nothing is checked. If
            there are loader processes, one draws the rows of the check as well, for a data set may open files at its
            first row, and processes that are started later would share them.
        hooks: The run's hooks, of which some go by a metric.

    Raises:
        ConfigError: The loss is no mean over rows or items; or see check_first_rows.
    """
    most = min(controller.max_micro, ROWS)
    device = torch.device("cpu") if settings is not None and Can.CUT_MODEL in settings.engine.can else world.device
    workers = 0 if settings is None else settings.run.loader.workers

    def check() -> None:
        if not folder.begun() and not on_meta(task.model):
            check_first_rows(task, controller, device, workers=workers, watched=watched(hooks))
            check_mean(task, controller.growth, controller.seed, device, most=most, workers=workers)

    world.on_rank0(check)


def check_again(task: Task, controller: Controller, world: World, *, most: int) -> None:
    """Check again, once the run has made some updates, that the loss is a mean over rows or items.

    Collective: every rank must call, and computes the same losses. They are forward passes: the ledger counts nothing.

    Args:
        task: Model, loss and data.
        controller: Gives the seed and the number of samples.
        world: The ranks.
        most: Rows of a pass, at most.

    Raises:
        ConfigError: It is none.
    """
    if is_stream(task.train) or getattr(task.model, "_compiled_call_impl", None) is not None:
        return  # rows of a stream are read once; a compiled model would be compiled for every number of rows
    stream = open_stream(task.train, seed=controller.seed, collate=task.collate)

    def check() -> None:
        check_mean_over_rows(task.model, task.loss, stream, items=task.items, most=min(most, ROWS), trained=True)

    try:
        world.on_all_ranks(check)
    except ConfigError as error:
        raise ConfigError(str(error).replace("at trial parameters", "after some updates")) from None


def check_mean(
    task: Task,
    growth: GrowthPolicy,
    seed: int,
    device: torch.device | None = None,
    *,
    most: int = ROWS,
    workers: int = 0,
) -> None:
    """Check that the loss is a mean over rows or items: see check_mean_over_rows. The model is moved to `device`.

    Args:
        task: Model, loss and data.
        growth: The growth policy.
        seed: Of the order of the data.
        device: Where the model is moved; None leaves it.
        most: Rows of a pass, at most; a pass has two even if this is 1.
        workers: Loader processes, of which one is used if there are any.

    Raises:
        ConfigError: The loss is no mean over rows or items, task.collate adds or drops some, or growth compares samples
            and there is only one.
    """
    total = size_of(task.train)
    if total < 2:
        if growth.needs - {Measure.LOSS}:
            raise ConfigError(
                f"growth.kind={growth.name} goes by how samples differ, but the training set has {total}; "
                "it needs at least 2"
            )
        return
    task.model.to(device=device)
    stream = open_stream(task.train, seed=seed, collate=task.collate)
    check_mean_over_rows(task.model, task.loss, stream, items=task.items, most=most, workers=workers)
