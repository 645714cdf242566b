"""The check of a task's loss before training: an exact update needs the mean over the rows of a batch."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from distgrow.core.errors import ConfigError
from distgrow.data.seeding import kept_generators, seed_generators
from distgrow.data.stream import SampleStream
from distgrow.distributed.world import World
from distgrow.engine.batches import Buffers, Loss, place
from distgrow.growth.base import GrowthPolicy
from distgrow.growth.controller import Controller
from distgrow.run.folder import RunFolder
from distgrow.tasks.task import Task

#: Rows of a group, rows of the first of its two parts, and groups.
ROWS, FIRST, GROUPS = 8, 3, 4
#: Seeds over which the loss is averaged if it draws random numbers, and the share by which it may then be off.
DRAWS, COARSE = 8, 0.3

#: The loss of the rows in a range at a seed, or None if it is no finite number.
LossOf = Callable[[range, int], float | None]


def check_loss(task: Task, controller: Controller, folder: RunFolder, world: World, *, workers: int = 0) -> None:
    """Check that the loss is a mean over rows, if no run has begun in `folder`. Collective: every rank must call.

    The first rank makes a few forward passes, none of them with a gradient: the ledger counts nothing.

    Args:
        workers: Loader processes of the run. If there are any, one draws the rows of the check as well, for a data set
            may open files at its first row, and processes that are started later would share them.

    Raises:
        ConfigError: The loss is no mean over rows.
    """
    most = min(controller.max_micro, ROWS)

    def check() -> None:
        if not folder.begun():
            check_mean(task, controller.growth, controller.seed, world.device, most=most, workers=workers)

    world.on_rank0(check)


def check_mean(
    task: Task,
    growth: GrowthPolicy,
    seed: int,
    device: torch.device | None = None,
    *,
    most: int = ROWS,
    workers: int = 0,
) -> None:
    """Check the loss of groups of rows against the losses of their parts, in eval mode.

    A mean over rows is one at all parameters. The check is therefore made at parameters that are moved at random:
    at the first ones all rows may have the same loss. Nothing is decided about a loss that fails in eval mode, is not
    finite or is no number. The model is moved to `device`, and otherwise left as it was.

    Args:
        most: Rows of a pass, at most; a pass has two even if this is 1.
        workers: Loader processes, of which one is used if there are any.

    Raises:
        ConfigError: The loss is no mean over rows, or growth compares samples and there is only one.
    """
    total = len(task.train)
    if total < 2:
        if growth.measures or growth.tests_progress or growth.probes_norm:
            raise ConfigError(
                f"growth.kind={growth.name} goes by how samples differ, but the training set has {total}; "
                "it needs at least 2"
            )
        return
    size = min(max(2, most), total)
    groups = [range(k * size, (k + 1) * size) for k in range(max(1, min(GROUPS * ROWS, total) // size))]
    drawn = _drawn(task, seed, groups, workers)
    task.model.to(device=device)
    with kept_generators(device), _moved(task.model):
        check_groups(_losses(task.model, task.loss, drawn), groups, _tolerance(task.model))


def check_groups(loss_of: LossOf, groups: list[range], tolerance: float) -> None:
    """Raise ConfigError if the loss of a group is not the mean of its parts' losses, weighted by their rows."""
    whole, again = loss_of(groups[0], 0), loss_of(groups[0], 1)
    if whole is None or again is None:
        return
    random = whole != again
    seeds = range(DRAWS if random else 1)
    for group in groups[:1] if random else groups:
        losses = {rows: _mean(loss_of, rows, seeds) for rows in (group, *parts_of(group))}
        if any(loss is None for loss in losses.values()):
            return
        sizes = [(len(rows), loss) for rows, loss in losses.items() if loss is not None]
        if not is_mean(sizes[0][1], sizes[1:], COARSE if random else tolerance):
            raise ConfigError(_refusal(sizes))


def parts_of(group: range) -> tuple[range, range]:
    """Return two parts of a group, of different sizes if it has more than two rows."""
    cut = group.start + max(1, min(FIRST, (len(group) - 1) // 2))
    return range(group.start, cut), range(cut, group.stop)


def is_mean(whole: float, parts: list[tuple[int, float]], tolerance: float) -> bool:
    """Return whether a loss is the mean of its parts, given as (rows, loss), up to a relative tolerance."""
    mean = math.fsum(rows * loss for rows, loss in parts) / sum(rows for rows, _ in parts)
    scale = max(abs(whole), *(abs(loss) for _, loss in parts))
    return abs(whole - mean) <= tolerance * scale


def _refusal(sizes: list[tuple[int, float]]) -> str:
    (rows, whole), (one, first), (other, second) = sizes
    is_sum = math.isclose(whole, first + second, rel_tol=0.03)
    way_out = (
        "it is their sum: divide it by the number of rows"
        if is_sum
        else "a mean over tokens or labels, by class weights or over pairs of rows is none: take the mean of each row "
        "first, then the mean over the rows (with weights: the sum of weight × loss, divided by the number of rows)"
    )
    return (
        f"the loss is no mean over samples: at trial parameters it is {whole:.6g} for {rows} samples, but {first:.6g} "
        f"and {second:.6g} for {one} and {other} of them, so training would depend on engine.max_micro and the number "
        f"of ranks; return the mean over the rows of the batch: {way_out}"
    )


def _mean(loss_of: LossOf, rows: range, seeds: range) -> float | None:
    losses = [loss for seed in seeds if (loss := loss_of(rows, seed)) is not None]
    return math.fsum(losses) / len(losses) if len(losses) == len(seeds) else None


def _drawn(task: Task, seed: int, groups: list[range], workers: int) -> dict[range, Any]:
    """Return the collated rows of all groups and of their parts."""
    wanted = [rows for group in groups for rows in (group, *parts_of(group))]
    stream: Any = SampleStream(task.train, seed=seed, collate=task.collate)
    if not workers:
        return {rows: stream.__getitems__(rows) for rows in wanted}
    sampler: Any = wanted
    return dict(zip(wanted, DataLoader(stream, batch_sampler=sampler, collate_fn=_as_is, num_workers=1), strict=True))


def _as_is(batch: Any) -> Any:
    return batch


def _losses(model: nn.Module, loss: Loss, drawn: dict[range, Any]) -> LossOf:
    """Return the function that computes the loss of rows in `drawn`, in eval mode."""
    first = next(model.parameters(), torch.empty(0))
    dtype = first.dtype if first.is_floating_point() and first.dtype != torch.float32 else None

    def loss_of(rows: range, seed: int) -> float | None:
        seed_generators(seed, first.device)
        try:
            with torch.no_grad(), torch.backends.cudnn.flags(allow_tf32=False):
                value: Any = loss(model, place(drawn[rows], first.device, dtype))
        except Exception:  # whatever a user's code raises in eval mode: the first update shows what is wrong
            return None
        if not isinstance(value, Tensor) or value.numel() != 1:
            return None  # the first update refuses it
        return value.item() if bool(value.isfinite()) else None

    return loss_of


@contextmanager
def _moved(model: nn.Module) -> Iterator[None]:
    """Put a model in eval mode and move its parameters at random; at the end make all as it was."""
    parameters = list({id(parameter): parameter for parameter in model.parameters()}.values())
    modes = {module: module.training for module in model.modules()}
    kept = [parameter.detach().clone() for parameter in parameters]
    buffers = Buffers(model)
    model.eval()
    try:
        with torch.no_grad():
            for parameter in filter(_is_inexact, parameters):
                numbers = torch.Generator(parameter.device).manual_seed(parameter.numel())
                noise = torch.randn(parameter.shape, generator=numbers, device=parameter.device)
                parameter.add_(noise.to(parameter.dtype), alpha=_spread(parameter))
        yield
    finally:
        with torch.no_grad():
            for parameter, value in zip(parameters, kept, strict=True):
                parameter.copy_(value)
        buffers.restore()
        for module, training in modes.items():
            module.training = training


def _is_inexact(parameter: Tensor) -> bool:
    return (parameter.is_floating_point() or parameter.is_complex()) and parameter.numel() > 0


def _spread(parameter: Tensor) -> float:
    """Return how far the check moves a parameter: as far as a usual initialisation spreads weights."""
    return math.sqrt(parameter.shape[0] / parameter.numel()) if parameter.dim() > 1 else 0.1


def _tolerance(model: nn.Module) -> float:
    """Return the relative tolerance of a loss, for the coarsest numbers that the model computes in."""
    eps = [torch.finfo(p.dtype).eps for p in model.parameters() if p.is_floating_point()]
    return max(1e-4, 3 * max(eps, default=0.0))
