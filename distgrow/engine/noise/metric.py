"""The metric of an adaptive optimizer's steps, in which gradients can be measured; knows no engine."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from distgrow.core.plan import Plan
from distgrow.optim import OptimizerSpec
from distgrow.optim.direction import Preconditioner, real

#: √P of each parameter, in the order of a list of them; None: it has made no step yet, and is not measured.
Roots = list[Tensor | None]


class StepMetric:
    """Hold P of the coming step −η·P·g, with each group's `lr_scale`, for an update that is measured in it."""

    def __init__(
        self, spec: OptimizerSpec, optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter]
    ) -> None:
        self._scales, self._optimizer, self._parameters = spec.preconditioner(), optimizer, parameters
        self._roots: Roots | None = None

    def begin(self, plan: Plan) -> Roots | None:
        """Return √P if the plan's noise is measured in it; None if it is not, or before the first step."""
        scales = self._scales if plan.preconditioned and plan.window else None
        self._roots = None if scales is None else self._found(scales)
        return self._roots

    @torch.no_grad()
    def _found(self, of: Preconditioner) -> Roots | None:
        roots: dict[Tensor, Tensor] = {}
        for group in self._optimizer.param_groups:
            known = [parameter for parameter in group["params"] if self._optimizer.state.get(parameter)]
            scales = of([self._optimizer.state[parameter] for parameter in known], group)
            share = group.get("lr_scale", 1.0)
            roots |= {parameter: scale.mul_(share).sqrt_() for parameter, scale in zip(known, scales, strict=True)}
        return [roots.get(parameter) for parameter in self._parameters] if roots else None

    def square(self, *, clipped: float) -> float | None:
        """Return gᵀPg, or None if it is not measured. Waits for a GPU.

        Args:
            clipped: What the gradients that the parameters have now were multiplied by.
        """
        if self._roots is None:
            return None
        pairs = zip(self._parameters, self._roots, strict=True)
        with torch.no_grad():
            scaled = [in_metric(p.grad, root) for p, root in pairs if p.grad is not None and root is not None]
        return sum(float(norm.square()) for norm in torch._foreach_norm(scaled)) / clipped**2  # pyright: ignore[reportPrivateImportUsage]


def in_metric(gradient: Tensor, root: Tensor) -> Tensor:
    """Return √P·g, whose norm is that of g in the metric."""
    return real(gradient) * root
