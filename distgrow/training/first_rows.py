"""What a few rows show of loss, metrics and BatchNorm before a run has a folder; makes forward passes alone."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader

from distgrow.core.errors import ConfigError
from distgrow.data.loader import outlive_signals, shared_memory_told
from distgrow.data.seeding import kept_generators
from distgrow.data.stream import SampleStream
from distgrow.engine.batches import Buffers, checked_loss, map_leaves, place
from distgrow.engine.metrics import check_metrics
from distgrow.engine.objective import SingleRow, WeightedLoss, single_row_told
from distgrow.growth.controller import Controller
from distgrow.tasks.task import Task
from distgrow.tracking.events import RESERVED

#: Positions in the sample stream; one may occur several times.
Rows = tuple[int, ...]
#: Rows of the training set, and of the test set, that are looked at.
ROWS = 8


def check_first_rows(task: Task, controller: Controller, device: torch.device, *, workers: int = 0) -> None:
    """Check what loss and metrics return, and that BatchNorm can train on the smallest micro-batch.

    Nothing is decided about code that fails here, but for BatchNorm's: an engine may call it in another precision.
    The model is moved to `device`, and otherwise left as it was.

    Args:
        task: Model, loss and data.
        controller: Gives the seed, the ranks and the micro-batches.
        device: Where the model is moved.
        workers: Loader processes of the run; if there are any, one draws these rows as well.

    Raises:
        ConfigError: The loss is no tensor of one number with a gradient, metrics are no mapping of numbers or have
            names that are taken, or a micro-batch of one row is to be trained with BatchNorm.
    """
    objective = WeightedLoss(task.model, task.loss).to(device=device)
    count = min(controller.max_micro, ROWS, len(task.train))
    smallest = smallest_micro(controller) if has_batch_norm(objective) else ROWS
    wanted = [tuple(range(count)), *([(0,)] if smallest == 1 else [])]
    drawn = draw(SampleStream(task.train, seed=controller.seed, collate=task.collate), wanted, workers)
    with kept_generators(device), unchanged(objective):
        check_loss_value(objective, placed(drawn[wanted[0]], objective))
        if smallest == 1:
            _check_one_row(objective, placed(drawn[(0,)], objective), controller)
        if task.test is not None and task.metrics is not None:
            rows = tuple(range(min(ROWS, len(task.test))))
            tested = draw(SampleStream(task.test, collate=task.collate), [rows], workers)
            _check_metrics(objective, task.metrics, placed(tested[rows], objective))


def draw(stream: SampleStream, batches: Sequence[Rows], workers: int) -> dict[Rows, Any]:
    """Return the collated rows of each batch.

    With `workers` one loader process draws them: a data set may open files at its first row, and processes that are
    started later would share them.
    """
    if not workers:
        return {rows: stream.__getitems__(rows) for rows in batches}
    dataset, sampler = cast(Any, stream), cast(Any, batches)
    loaded = DataLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=_as_is,
        num_workers=1,
        prefetch_factor=1,
        worker_init_fn=outlive_signals,
    )
    drawn, rows = dict[Rows, Any](), max(map(len, batches))
    with shared_memory_told(
        f"the few micro-batches of {rows} rows that a loader process draws before the run begins; set "
        f"run.loader.workers=0 in place of {workers}"
    ):
        for numbers, batch in zip(batches, loaded, strict=True):
            drawn[numbers] = map_leaves(_copied, batch)  # so that shared memory holds few at a time
    return drawn


def _copied(leaf: Any) -> Any:
    return leaf.clone() if isinstance(leaf, torch.Tensor) else leaf


def _as_is(batch: Any) -> Any:
    return batch


@contextmanager
def unchanged(module: nn.Module) -> Iterator[None]:
    """Restore the modes and buffers of a module when the context ends."""
    modes, buffers = {part: part.training for part in module.modules()}, Buffers(module)
    try:
        yield
    finally:
        buffers.restore()
        for part, training in modes.items():
            part.training = training


def placed(batch: Any, module: nn.Module) -> Any:
    """Return a batch on the device and in the precision of a module's first parameter."""
    first = next(module.parameters(), torch.empty(0))
    dtype = first.dtype if first.is_floating_point() and first.dtype != torch.float32 else None
    return place(batch, first.device, dtype)


def check_loss_value(objective: WeightedLoss, batch: Any) -> None:
    """Check that the loss of a batch is a tensor of one number with a gradient.

    Eval mode is asked first, as it changes nothing. Only the answer of training mode is a reason to refuse: a loss may
    be made for training alone.

    Raises:
        ConfigError: It is not.
    """
    if _fault(objective.eval(), batch) and (fault := _fault(objective.train(), batch)):
        raise fault


def _fault(objective: WeightedLoss, batch: Any) -> ConfigError | None:
    try:
        value = objective.loss(objective.model, batch)
    except Exception:  # whatever a user's code raises: the first update shows it
        return None
    try:
        checked_loss(value)
    except ConfigError as error:
        return error
    return None


def _check_metrics(objective: WeightedLoss, metrics: Callable[..., Any], batch: Any) -> None:
    objective.eval()
    try:
        with torch.no_grad():
            values = metrics(objective.model, batch)
    except Exception:  # the first evaluation shows it
        return
    check_metrics(values)
    if clash := RESERVED & values.keys():
        raise ConfigError(f"task.metrics returns {', '.join(sorted(clash))}, which every event has; rename it")


def has_batch_norm(module: nn.Module) -> bool:
    """Return whether a part of a module normalises by the statistics of one rank's micro-batch."""
    return any(isinstance(part, _BatchNorm) and not isinstance(part, nn.SyncBatchNorm) for part in module.modules())


def smallest_micro(controller: Controller) -> int:
    """Return the rows of the smallest micro-batch of the run that the controller forecasts."""
    plans = (stride.plan for stride in controller.forecast())
    return min((plan.batch // plan.world // plan.accum for plan in plans), default=ROWS)


def _check_one_row(objective: WeightedLoss, row: Any, controller: Controller) -> None:
    """Check that the model trains on one row, as BatchNorm does if each row has several positions."""
    start, world, micro = controller.growth.start, controller.world, controller.max_micro
    where = f"growth.start={start} on {world} ranks with engine.max_micro={micro} has micro-batches of one row"
    try:
        with single_row_told(where), torch.no_grad():
            objective.train().loss(objective.model, row)
    except SingleRow:
        raise
    except Exception:  # the first update shows it
        return
