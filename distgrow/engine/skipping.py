"""An optimizer step that is undone on the device if its gradient was not finite; the host does not wait to know."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from distgrow.engine.noise.hooks import StepProducts
from distgrow.optim.composite import Composite


def step_unless(
    bad: Tensor, optimizer: torch.optim.Optimizer, products: StepProducts, step: Callable[[], None]
) -> list[list[Tensor]]:
    """Step unless `bad`, one truth value on the device, is true, which the host does not wait for.

    Returns:
        Inner products of the step: see StepProducts.terms.
    """
    products.before_step(optimizer)
    terms = products.terms()
    with undone_where(bad, optimizer):
        step()
    products.after_step(optimizer)
    return terms


@contextmanager
def undone_where(bad: Tensor, optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Undo the step inside the context if `bad` is true.

    Fused kernels look at it themselves. For others parameters and state are copied before the step, which takes their
    memory once more. State that the step makes becomes 0, with which those optimizers begin.

    Args:
        bad: One truth value on the parameters' device.
        optimizer: It makes one step inside the context. It must have made one before.
    """
    parts = optimizer.optimizers if isinstance(optimizer, Composite) else [optimizer]
    fused = [part for part in parts if looks_itself(part)]
    for part in fused:
        part.grad_scale, part.found_inf = None, bad.float()  # pyright: ignore[reportAttributeAccessIssue]
    others = [part for part in parts if part not in fused]
    kept = {tensor: tensor.detach().clone() for part in others for tensor in _tensors(part)}
    try:
        yield
    finally:
        for part in fused:
            del part.grad_scale, part.found_inf  # pyright: ignore[reportAttributeAccessIssue]
    for tensor in [tensor for part in others for tensor in _tensors(part)]:
        before, after = kept.get(tensor), tensor.detach()
        after.copy_(torch.where(bad, torch.zeros_like(after) if before is None else before, after))


def looks_itself(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether an optimizer's kernels skip a step that a gradient scaler would skip.

    Groups that are loaded may ask for others than those that the optimizer was built with.
    """
    fused = all(group.get("fused") for group in optimizer.param_groups)
    return fused and bool(getattr(optimizer, "_step_supports_amp_scaling", False))


def _tensors(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Return the parameters that have a gradient, and their state."""
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    states = [optimizer.state[p] for p in parameters]
    return parameters + [value for state in states for value in state.values() if isinstance(value, Tensor)]
