"""What a few rows show of loss, metrics and BatchNorm before a run has a folder; makes forward passes alone."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from distgrow.core.counted import counted
from distgrow.core.errors import ConfigError
from distgrow.data.dataset import size_of
from distgrow.data.seeding import kept_generators
from distgrow.data.stream import open_stream
from distgrow.engine.batches import checked_loss
from distgrow.engine.metrics import check_metrics
from distgrow.engine.objective import WeightedLoss, check_single_row
from distgrow.engine.trial_rows import ROWS, draw, placed, unchanged
from distgrow.growth.base import GrowthPolicy
from distgrow.growth.branching import Branching
from distgrow.growth.controller import Controller
from distgrow.growth.draws import draws_size
from distgrow.tasks.task import Task, test_sets
from distgrow.tracking.events import RESERVED

#: Pairs of a key of the config, and the metric that it names.
Watched = Iterable[tuple[str, str]]


def check_first_rows(
    task: Task, controller: Controller, device: torch.device, *, workers: int = 0, watched: Watched = ()
) -> None:
    """Check what loss and metrics return, and that BatchNorm can train on the smallest micro-batch.

    Nothing is decided about code that fails here, but for BatchNorm's: an engine may call it in another precision.
    The model is moved to `device`, and otherwise left as it was.

    Args:
        task: Model, loss and data.
        controller: Gives the seed, the ranks and the micro-batches.
        device: Where the model is moved.
        workers: Loader processes of the run; if there are any, one draws these rows as well.
        watched: Metrics of the test sets that the run goes by.

    Raises:
        ConfigError: The loss is no tensor of one number with a gradient, metrics are no mapping of numbers, have names
            that are taken or lack a watched one, or a micro-batch of one row is to be trained with BatchNorm.
    """
    objective = WeightedLoss(task.model, task.loss).to(device=device)
    count = min(controller.max_micro, ROWS, size_of(task.train))
    smallest = smallest_micro(controller) if has_batch_norm(objective) else ROWS
    wanted = [tuple(range(count)), *([(0,)] if smallest == 1 else [])]
    drawn = draw(open_stream(task.train, seed=controller.seed, collate=task.collate), wanted, workers)
    with kept_generators(device), unchanged(objective):
        check_loss_value(objective, placed(drawn[wanted[0]], objective))
        if smallest == 1:
            _check_one_row(objective, placed(drawn[(0,)], objective), controller)
        known = _metrics_of(task, controller.growth, objective, workers)
    if known:
        check_watched(watched, [*known, *(f"average/{name}" for name in known if controller.average is not None)])


def _metrics_of(task: Task, growth: GrowthPolicy, objective: WeightedLoss, workers: int) -> list[str]:
    """Check what the metrics return for a few rows of each test set.

    Returns:
        The names that evaluations will have. None are known if the user's code fails here, or returns pairs (sum,
        count), which some batches may lack.
    """
    known, certain = list[str](), True
    for name, test in test_sets(task.test).items():
        values: Mapping[str, Any] | None = {"loss": 0.0}
        if task.metrics is not None:
            rows = tuple(range(min(ROWS, len(test))))
            tested = draw(open_stream(test, collate=task.collate), [rows], workers)
            values = _checked_metrics(objective, task.metrics, placed(tested[rows], objective), named=bool(name))
            if values is not None:
                check_decides(growth, name, values)
        certain = certain and values is not None and not any(isinstance(one, tuple | list) for one in values.values())
        known += [f"{name}/{metric}" if name else metric for metric in values or ()]
    return known if certain else []


def check_watched(watched: Watched, known: Sequence[str]) -> None:
    """Check that evaluations will have the metrics that the run goes by.

    Raises:
        ConfigError: They will not.
    """
    for key, metric in watched:
        if metric not in known:
            raise ConfigError(f"{key}={metric}: the evaluation has no such metric; it has {', '.join(sorted(known))}")


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


def check_decides(growth: GrowthPolicy, test: str, metrics: Iterable[str]) -> None:
    """Check that metrics of a test set have the one that growth goes by, if it goes by one of this set.

    Raises:
        ConfigError: They have not.
    """
    if not isinstance(growth, Branching) or growth.goes_by != "validation":
        return
    chosen, metric = growth.validates()
    if chosen in (None, test) and metric not in metrics:
        raise ConfigError(f"growth.metric={metric}: task.metrics returns {', '.join(metrics)}; choose one of them")


def _checked_metrics(
    objective: WeightedLoss, metrics: Callable[..., Any], batch: Any, *, named: bool
) -> Mapping[str, Any] | None:
    """Return the metrics of a batch; None if the user's code fails."""
    objective.eval()
    try:
        with torch.no_grad():
            values = metrics(objective.model, batch)
    except Exception:  # the first evaluation shows it
        return None
    check_metrics(values)
    if (clash := RESERVED & values.keys()) and not named:
        raise ConfigError(f"task.metrics returns {', '.join(sorted(clash))}, which every event has; rename it")
    return values


def has_batch_norm(module: nn.Module) -> bool:
    """Return whether a part of a module normalises by the statistics of one rank's micro-batch."""
    return any(isinstance(part, _BatchNorm) and not isinstance(part, nn.SyncBatchNorm) for part in module.modules())


def smallest_micro(controller: Controller) -> int:
    """Return the rows of the smallest micro-batch of the run that the controller forecasts."""
    if draws_size(controller.sampling):
        return 1
    plans = (stride.plan for stride in controller.forecast())
    return min((plan.batch // plan.world // plan.accum for plan in plans), default=ROWS)


def _check_one_row(objective: WeightedLoss, row: Any, controller: Controller) -> None:
    """Check that the model trains on one row, as BatchNorm does if each row has several positions."""
    start, world, micro = controller.growth.start, controller.world, controller.max_micro
    where = (
        f"growth.start={start} on {counted(world, 'rank')} with engine.max_micro={micro} has micro-batches of one row"
    )
    if draws_size(controller.sampling):
        where = "sampling draws a random number of rows, so that some micro-batch has one row"
    try:
        with torch.no_grad():
            objective.train().loss(objective.model, row)
    except ValueError as error:
        check_single_row(error, where)
    except Exception:  # the first update shows it
        return
