"""Objective: whether a task's loss is what gradient noise presumes, a mean over samples; knows no engine."""

import math
from typing import Any

import torch
from torch import Tensor

from distgrow.core.errors import ConfigError
from distgrow.core.progress import Ledger, Progress
from distgrow.data.stream import SampleStream
from distgrow.distributed.world import World
from distgrow.engine.batches import place
from distgrow.growth.base import GrowthPolicy
from distgrow.growth.controller import Controller
from distgrow.run.folder import RunFolder
from distgrow.tasks.task import Task

#: Rows that are tried, cut in parts of different sizes.
ROWS, FIRST = 8, 3


def goes_by_means(growth: GrowthPolicy) -> bool:
    """Whether growth measures what only a mean over samples shows."""
    return growth.measures or growth.tests_progress or growth.probes_norm


def tried(task: Task, controller: Controller, folder: RunFolder, world: World) -> int:
    """`check_mean` on the first rank, where growth goes by it and no run has begun in `folder`. Collective.

    ConfigError where that spends the budget.
    """
    growth = controller.growth
    if not goes_by_means(growth):
        return 0
    spent = world.on_rank0(lambda: 0 if folder.begun() else check_mean(task, growth, controller.seed))
    if controller.done(Progress(ledger=Ledger(probe=spent))):
        raise ConfigError(
            f"budget.sfo={controller.budget.sfo}: growth.kind={growth.name} has the loss tried at the start, which "
            f"takes {spent} gradient evaluations; raise it"
        )
    return spent


def is_mean(whole: float, parts: list[tuple[int, float]], tolerance: float) -> bool:
    """Whether a batch's loss is that of its parts, given as (rows, loss), weighted by their rows."""
    mean = math.fsum(rows * loss for rows, loss in parts) / sum(rows for rows, _ in parts)
    scale = max(abs(whole), *(abs(loss) for _, loss in parts))
    return abs(whole - mean) <= tolerance * scale


def check_mean(task: Task, growth: GrowthPolicy, seed: int) -> int:
    """ConfigError where the loss is no mean over samples: held, in eval mode, against that of a batch cut in two.

    Gives the evaluations that it took. Nothing is decided where the loss draws random numbers of its own, is not finite
    or is no number. The model is where it was before, and in the mode that it was in.
    """
    rows = min(ROWS, len(task.train))
    if rows < 2:
        raise ConfigError(
            f"growth.kind={growth.name} goes by how samples differ, but the training set has {len(task.train)}; "
            "it needs at least 2"
        )
    cut = min(FIRST, rows - 1)
    positions = SampleStream(task.train, seed=seed, collate=task.collate)
    losses: list[float | None] = []
    for number, part in enumerate([range(rows), range(rows), range(cut), range(cut, rows)]):
        losses.append(_loss(task, positions.__getitems__(part), seed=min(number, 1)))
    whole, again, first, second = losses
    if whole is None or again is None or first is None or second is None or whole != again:
        return 3 * rows
    if not is_mean(whole, [(cut, first), (rows - cut, second)], _tolerance(task)):
        raise ConfigError(
            f"the loss is no mean over samples, which growth.kind={growth.name} goes by: it is {whole:.6g} for "
            f"{rows} samples, but {first:.6g} and {second:.6g} for {cut} and {rows - cut} of them; "
            "return the mean over the rows of the batch"
        )
    return 3 * rows


def _loss(task: Task, batch: Any, seed: int) -> float | None:
    """The batch's loss as training begins with it; None where it is no finite number."""
    first = next(task.model.parameters(), torch.empty(0))
    devices = [first.device] if first.device.type == "cuda" else []
    dtype = first.dtype if first.is_floating_point() and first.dtype != torch.float32 else None
    was_training = task.model.training
    task.model.eval()
    try:
        with torch.random.fork_rng(devices), torch.no_grad():
            torch.manual_seed(seed)
            loss: Any = task.loss(task.model, place(batch, first.device, dtype))
    finally:
        task.model.train(was_training)
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        return None  # told at the first update
    return loss.item() if bool(loss.isfinite()) else None


def _tolerance(task: Task) -> float:
    """Relative; for the coarsest numbers that the model computes in."""
    eps = [torch.finfo(p.dtype).eps for p in task.model.parameters() if p.is_floating_point()]
    return max(1e-4, 30 * max(eps, default=0.0))
