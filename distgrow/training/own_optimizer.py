"""What fit(optimizer=…) may be beside a spec: an optimizer of torch's kind, several, a class, or a function."""

import inspect
from collections.abc import Callable
from functools import partial
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
            function of the model that returns one or several; of the last two a partial as well. Anything else is
            returned as it is.
        model: The model.
        lr: The learning rate, or None.

    Raises:
        ConfigError: The optimizer's learning rate is another one than `lr` has; a function returned no optimizer; or
            see `own`.
    """
    made = _made(optimizer, model)
    if isinstance(made, Given):
        rate = rate_of(scaled(made.optimizer))
        if lr is None and rate > 0:
            lr = LR(base=rate)
        elif isinstance(lr, LR) and lr.unknown:
            lr = lr.starting(rate) if rate > 0 else lr
        elif isinstance(lr, LR) and lr.base != "auto":
            check_base(made.optimizer, lr.initial, "optimizer")
    return {"optimizer": made, "lr": lr}


def _made(optimizer: Any, model: nn.Module) -> Any:
    if optimizer is None or isinstance(optimizer, OptimizerSpec) or not isinstance(model, nn.Module):
        return optimizer
    called = optimizer.func if isinstance(optimizer, partial) else optimizer
    if isinstance(called, type):
        return _of_class(optimizer, called, model) if issubclass(called, torch.optim.Optimizer) else optimizer
    if inspect.isfunction(called) or inspect.ismethod(called) or inspect.isbuiltin(called):
        if called.__module__ is not None and called.__module__.startswith("distgrow."):
            return optimizer  # not called, as check_arguments says
        return _returned(optimizer(model), called.__name__)
    return own(optimizer) if _of_torch(optimizer) else optimizer


def _of_class(make: Callable[..., Any], kind: type[Any], model: nn.Module) -> Given:
    try:
        return own(make(model.parameters()))
    except TypeError as error:
        raise ConfigError(f"optimizer={kind.__name__} (a class): {error}; build it and give the object") from None


def _returned(made: Any, name: str) -> OptimizerSpec:
    """Return what a function of the model returned, as a spec."""
    if isinstance(made, OptimizerSpec):
        return made
    if not _of_torch(made):
        raise ConfigError(
            f"optimizer: {name}(model) returned {'None' if made is None else f'a {type(made).__name__}'}; it must "
            "return a torch.optim.Optimizer, or a list of several"
        )
    return own(made)


def _of_torch(value: Any) -> bool:
    several = value if isinstance(value, list | tuple) and value else [value]
    return all(isinstance(one, torch.optim.Optimizer) for one in several)
