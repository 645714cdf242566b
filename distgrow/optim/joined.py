"""Joined: what an optimizer of shards, a rank's rows of each parameter, asks for of the whole; knows no engine."""

from typing import Protocol

import torch
from torch import Tensor


class Joined(Protocol):
    """Bring the shards of all ranks together. Every method is collective: every rank must call."""

    def norms(self, own: Tensor) -> Tensor:
        """Return the norms of whole tensors from those of this rank's shards."""
        ...

    def whole(self, parameter: Tensor, value: Tensor) -> Tensor:
        """Return what is cut as `parameter` is, and is `value` here."""
        ...

    def own(self, parameter: Tensor, whole: Tensor) -> Tensor:
        """Return this rank's rows of what is whole on every rank."""
        ...


class Muon(torch.optim.Muon):
    """torch.optim.Muon, which makes the step of a whole matrix where a rank has some of its rows."""

    joined: Joined | None = None  #: None: matrices are whole

    @torch.no_grad()
    def step(self, closure: object = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Make one step."""
        if self.joined is None:
            super().step()
            return
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step_rows(parameter, group, self.joined)

    def _step_rows(self, parameter: Tensor, group: dict[str, object], joined: Joined) -> None:
        """Step some rows of a matrix: the momentum is kept of these, and made orthogonal whole, on every rank."""
        gradient, state, momentum = parameter.grad, self.state[parameter], group["momentum"]
        assert gradient is not None
        assert isinstance(momentum, float)
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        kept = state["momentum_buffer"].lerp_(gradient, 1 - momentum)
        update = gradient.lerp(kept, momentum) if group["nesterov"] else kept
        step = joined.own(parameter, _orthogonal(joined.whole(parameter, update), group))
        parameter.mul_(1 - group["lr"] * group["weight_decay"])  # pyright: ignore[reportOperatorIssue]
        parameter.add_(step, alpha=group["lr"])  # pyright: ignore[reportArgumentType]


def _orthogonal(update: Tensor, group: dict[str, object]) -> Tensor:
    """Return the step of torch.optim.Muon at learning rate 1, from 0 and without memory, against an update."""
    start = torch.zeros_like(update)
    start.grad = update
    kept = {name: group[name] for name in ("ns_coefficients", "eps", "ns_steps", "adjust_lr_fn")}
    torch.optim.Muon([start], lr=1.0, weight_decay=0.0, momentum=0.0, nesterov=False, **kept).step()  # pyright: ignore[reportArgumentType]
    return start
