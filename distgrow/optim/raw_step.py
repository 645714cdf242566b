"""A step of an optimizer without what torch puts around it, which takes longer than a small model's step itself."""

import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.optim.optimizer as torchs
from torch import Tensor

_TORCH = str(Path(torch.__file__).parent) + os.sep
#: What torch's fused kernels look at, if a gradient scaler or distgrow.engine.skipping has put it there.
_SCALED = {"grad_scale", "found_inf"}


def step(optimizer: torch.optim.Optimizer) -> None:
    """Make one step, as `optimizer.step()` does.

    Torch's own optimizers label each step for the profiler, look for hooks, and tell the compiler. If nobody profiles
    and there are no hooks, what these wrap is called instead.
    """
    raw = None if _watched(optimizer) else unwrapped(type(optimizer).step)
    if raw is None:
        optimizer.step()
        return
    with torch.no_grad():
        if not (type(optimizer) is torch.optim.SGD and _plain_sgd(optimizer)):
            raw(optimizer)


def _plain_sgd(optimizer: Any) -> bool:
    """Make the step of torch's fused SGD without momentum by its kernel alone. Return False if it is another case."""
    unchecked = getattr(optimizer, "_need_device_dtype_check_for_fused", True)  # which copies lack
    if unchecked or _SCALED & vars(optimizer).keys() or not hasattr(torch, "_fused_sgd_"):
        return False
    calls: list[tuple[list[Tensor], list[Tensor], dict[str, Any]]] = []
    for group in optimizer.param_groups:
        parameters = group["params"]
        gradients = [gradient for parameter in parameters if (gradient := parameter.grad) is not None]
        alike = len({(parameter.dtype, parameter.device) for parameter in parameters}) == 1
        plain = group["fused"] and not group["momentum"] and len(gradients) == len(parameters) and alike
        if not plain:
            return False
        calls.append((parameters, gradients, group))
    for parameters, gradients, group in calls:
        torch._fused_sgd_(  # pyright: ignore[reportPrivateImportUsage]
            parameters, gradients, [],
            weight_decay=group["weight_decay"], momentum=0.0, lr=group["lr"], dampening=group["dampening"],
            nesterov=False, maximize=group["maximize"], is_first_step=False,
        )  # fmt: skip
    return True


def _watched(optimizer: Any) -> bool:
    """Return whether anybody profiles the step, has hooks around it, has replaced it, or differentiates it.

    So it is held of a torch that does not tell.
    """
    try:
        return bool(
            optimizer._optimizer_step_pre_hooks
            or optimizer._optimizer_step_post_hooks
            or torchs._global_optimizer_pre_hooks
            or torchs._global_optimizer_post_hooks
            or "step" in vars(optimizer)
            or optimizer.defaults.get("differentiable")
            or torch.autograd._profiler_enabled()  # pyright: ignore[reportPrivateImportUsage]
        )
    except AttributeError:
        return True


@cache
def unwrapped(step: Any) -> Callable[[Any], Any] | None:
    """Return a class's step without what torch.optim.optimizer wraps around it, or None if it is not all torch's."""
    raw, layer = None, step
    while layer is not None:
        code = getattr(layer, "__code__", None)
        if code is None or not code.co_filename.startswith(_TORCH):
            return None
        if raw is None and code.co_filename != torchs.__file__:
            raw = layer
        layer = getattr(layer, "__wrapped__", None)
    return raw
