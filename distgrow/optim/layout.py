"""How tensors lie in memory: fused kernels step number after number there, whatever the strides say."""

from typing import Any

import torch
from torch import Tensor


def without_gaps(tensor: Tensor) -> bool:
    """Return whether a tensor's numbers lie side by side, in whatever order; those of a slice do not."""
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    return not tensor.numel() or 1 + sum((size - 1) * stride for size, stride in steps) == tensor.numel()


def one_layout(first: list[Tensor], *others: list[Tensor]) -> bool:
    """Return whether all of `first` are without gaps, and the `others`, where not empty, are laid out as they are."""
    if all(tensor.is_contiguous() for tensors in (first, *others) for tensor in tensors):
        return True
    alike = (a.stride() == b.stride() for other in others if other for a, b in zip(first, other, strict=True))
    return all(map(without_gaps, first)) and all(alike)


def as_laid_out(value: Tensor, model: Tensor) -> Tensor:
    """Return a tensor with the strides of one of its shape; `value` itself if it has them, or has another shape."""
    if value.shape != model.shape or value.stride() == model.stride() or not without_gaps(model):
        return value
    return torch.empty_like(model, dtype=value.dtype, device=value.device).copy_(value)


def lay_out_state(optimizer: Any) -> None:
    """Lay out an optimizer's loaded state as its parameters are now, and fuse no step of those with gaps.

    A checkpoint may be of a model in another memory format.
    """
    for group in optimizer.param_groups:
        if group.get("fused") and not all(map(without_gaps, group["params"])):
            group["fused"] = False
        for parameter in group["params"]:
            state = optimizer.state.get(parameter, {})
            state.update({key: as_laid_out(v, parameter) for key, v in state.items() if isinstance(v, Tensor)})
