"""What fit(optimizer=…) may be beside a spec: an optimizer of torch's kind, several, a class, or a function."""

import inspect
from typing import Any

import torch
from torch import nn

from distgrow.core.errors import ConfigError
from distgrow.core.lr import LR
from distgrow.optim import OptimizerSpec
from distgrow.optim.own import Given, check_base, own, rate_of, scaled


def as_spec(optimizer: Any, model: nn.Module, lr: Any) -> dict[str, Any]:
    """Return the spec of an optimizer, and the learning rate, which is the optimizer's own if none is given.

    Args:
        optimizer: A spec, None, an optimizer over the model's parameters, several of them, a class of optimizers, or a
            function of the model that returns one or several. Anything else is returned as it is.
        model: The model.
        lr: The learning rate, or None.

    Raises:
        ConfigError: The optimizer's learning rate is another one than `lr` has; or see `own`.
    """
    made = _made(optimizer, model)
    if isinstance(made, Given):
        rate = rate_of(scaled(made.optimizer))
        if lr is None and rate > 0:
            lr = LR(base=rate)
        elif isinstance(lr, LR):
            check_base(made.optimizer, lr.base, "optimizer")
    return {"optimizer": made, "lr": lr}


def _made(optimizer: Any, model: nn.Module) -> Any:
    if optimizer is None or isinstance(optimizer, OptimizerSpec) or not isinstance(model, nn.Module):
        return optimizer
    if isinstance(optimizer, type):
        return _of_class(optimizer, model) if issubclass(optimizer, torch.optim.Optimizer) else optimizer
    if inspect.isfunction(optimizer) or inspect.ismethod(optimizer) or inspect.isbuiltin(optimizer):
        if optimizer.__module__ is not None and optimizer.__module__.startswith("distgrow."):
            return optimizer  # not called, as check_arguments says
        optimizer = optimizer(model)
    return own(optimizer) if _of_torch(optimizer) else optimizer


def _of_class(kind: type[Any], model: nn.Module) -> Given:
    try:
        return own(kind(model.parameters()))
    except TypeError as error:
        raise ConfigError(f"optimizer={kind.__name__} (a class): {error}; build it and give the object") from None


def _of_torch(value: Any) -> bool:
    several = value if isinstance(value, list | tuple) and value else [value]
    return all(isinstance(one, torch.optim.Optimizer) for one in several)
