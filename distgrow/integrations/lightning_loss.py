"""The check of a Lightning module's loss before the first update: it must be a mean over rows."""

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import LightningModule
from torch import nn
from torchmetrics import Metric

from distgrow.core.errors import ConfigError
from distgrow.data.spec import Loading
from distgrow.data.stream import SampleStream
from distgrow.engine.mean_check import check_mean_over_rows
from distgrow.engine.trial_rows import ROWS
from distgrow.growth.controller import Controller
from distgrow.integrations.session import Rows

#: What training_step may change of a module's own attributes, which is put back.
_PLAIN = (bool, int, float, str, type(None), list, dict, set, deque)


def check_step_loss(module: Any, dataset: Any, controller: Controller, rows: Rows) -> None:
    """Check that the loss of a module's training_step is a mean over rows, unless `rows` has `items` to count.

    training_step is called in eval mode, some dozens of times. Nothing that it logs is kept, and numbers and
    collections that it changes on the module are put back. Metrics of torchmetrics are reset.

    Args:
        module: A module that is Growing, where it will train.
        dataset: The training set.
        controller: Gives the seed and the largest micro-batch.
        rows: How rows are loaded, collated and counted.

    Raises:
        ConfigError: The loss is no mean over rows.
    """
    if rows.get("items") is not None:
        return
    stream = SampleStream(dataset, seed=controller.seed, collate=rows.get("collate"))
    most, loading = min(controller.max_micro, ROWS), rows.get("loading") or Loading()
    try:
        with untouched(module):
            check_mean_over_rows(module, _loss, stream, most=most, workers=loading.workers)
    except ConfigError as error:
        told = str(error).replace("engine.max_micro", "the controller's max_micro")
        raise ConfigError(f"{told}; or give Growth items=…, which counts what the loss is a mean over") from None


def _loss(module: Any, batch: Any) -> Any:
    return module.step_loss(0)(batch)


@contextmanager
def untouched(module: LightningModule) -> Iterator[None]:
    """Log nothing of what training_step logs, and put back what it changes on the module beside tensors."""
    own = vars(module)
    names = [name for name, value in own.items() if name not in vars(nn.Module()) and type(value) in _PLAIN]
    kept = {name: (own[name], _copied(own[name])) for name in names}
    logging = {name: own.get(name) for name in ("log", "log_dict")}
    own.update(dict.fromkeys(logging, lambda *_, **__: None))
    try:
        yield
    finally:
        for name, logger in logging.items():
            own.pop(name) if logger is None else own.update({name: logger})
        for name, (value, copied) in kept.items():
            own[name] = _refilled(value, copied)
        for metric in module.modules():
            if isinstance(metric, Metric):
                metric.reset()


def _copied(value: Any) -> Any:
    return value.copy() if isinstance(value, list | dict | set | deque) else value


def _refilled(value: Any, copied: Any) -> Any:
    """Return the same collection with what it held before."""
    if not isinstance(value, list | dict | set | deque):
        return value
    value.clear()
    value.extend(copied) if isinstance(value, list | deque) else value.update(copied)
    return value
