"""Norm and clipping of a mean gradient that a rank has whole; knows no engine."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn


def gradients(parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """Return the gradients of those parameters that have one."""
    return [gradient for parameter in parameters if (gradient := parameter.grad) is not None]


class GradientNorm:
    """Take the norm of a gradient; as nn.utils.get_total_norm, which sorts by device and takes twice as long."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        """Take the parameters. On a CPU, if all are float32, the norms of their gradients get places of their own."""
        self._parameters, self._norms = parameters, torch.empty(0)
        if all(type(p) is nn.Parameter and p.is_cpu and p.dtype == torch.float32 for p in parameters):
            self._norms = torch.empty(len(parameters))
        self._places = self._norms.unbind()

    def __call__(self) -> Tensor:
        """Return the norm of what the parameters' gradients are now."""
        given = gradients(self._parameters)
        if len(given) != len(self._places):
            return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(given)))  # pyright: ignore[reportPrivateImportUsage]
        for gradient, place in zip(given, self._places, strict=True):
            torch.linalg.vector_norm(gradient, out=place)
        return torch.linalg.vector_norm(self._norms)


def root_of(square: float) -> float:
    """Return the norm of a gradient from its square, which ranks add up; NaN if that is no square."""
    return math.sqrt(square) if square >= 0 else math.nan


def clip_factor(clip: float | None, norm: float) -> float:
    """Return what a gradient of this norm is multiplied by: torch's, 1 without a clip."""
    return 1.0 if clip is None else min(1.0, clip / (norm + 1e-6))


def clip_over_items(parameters: Sequence[nn.Parameter], clip: float | None, weight: float, norm: float) -> float:
    """Divide a gradient of this norm by `weight`, clip it, and return the norm between; NaN if there were no items."""
    norm = norm / weight if weight else math.nan
    factor = clip_factor(clip, norm)
    if math.isfinite(norm) and factor != weight:
        torch._foreach_mul_(gradients(parameters), factor / weight)  # pyright: ignore[reportPrivateImportUsage]
    return norm


def clip_on_device(parameters: Sequence[nn.Parameter], clip: float | None, weight: Tensor, norm: Tensor) -> Tensor:
    """Do as `clip_over_items` with numbers that are on the device, in double precision. The host does not wait."""
    norm = norm.double() / weight.double()  # NaN if there were no items
    factor = 1.0 if clip is None else torch.clamp(clip / (norm + 1e-6), max=1.0)
    torch._foreach_mul_(gradients(parameters), factor / weight.double())  # pyright: ignore[reportPrivateImportUsage]
    return norm
