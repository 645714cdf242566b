"""Joined and Flat: what an optimizer of shards asks for of whole parameters; knows no engine."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from distgrow.optim.raw_step import unwrapped


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


class Flat(Protocol):
    """Make steps of matrices of which each rank has any run of numbers, several matrices in one flat shard."""

    def steps(self, shard: Tensor, update: Tensor, make: Callable[[Tensor], Tensor]) -> Tensor:
        """Return this rank's numbers of the steps of a shard's matrices. Collective: every rank must call.

        Args:
            shard: The flat shard, which says what matrices there are.
            update: This rank's numbers of their updates, laid out as the shard.
            make: Returns the step of a whole matrix from its update.
        """
        ...


class Muon(torch.optim.Muon):
    """torch.optim.Muon that can also step parts of matrices, and make their momentum orthogonal in float32."""

    joined: Joined | None = None  #: None: a parameter is no rows of a matrix
    flat: Flat | None = None  #: None: a parameter is no flat shard
    exact: bool = False  #: whether momentum is made orthogonal in float32 or above; torch does it in bfloat16

    @torch.no_grad()
    def step(self, closure: object = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Make one step."""
        if self.joined is None and self.flat is None and not self.exact:
            _step_unseen(self)
            return
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step_matrix(parameter, group)

    def _step_matrix(self, parameter: Tensor, group: dict[str, Any]) -> None:
        """Step a matrix, some of its rows or a flat shard of several. Momentum is kept of what this rank has."""
        gradient, state, momentum = parameter.grad, self.state[parameter], group["momentum"]
        assert gradient is not None
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        kept = state["momentum_buffer"].lerp_(gradient, 1 - momentum)
        step = self._step_by(parameter, gradient.lerp(kept, momentum) if group["nesterov"] else kept, group)
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(step, alpha=group["lr"])

    def _step_by(self, parameter: Tensor, update: Tensor, group: dict[str, Any]) -> Tensor:
        """Return this rank's part of the step at learning rate 1; the momentum is made orthogonal whole."""
        make = partial(_exact_step if self.exact else _torchs_step, group=group)
        if self.flat is not None:
            return self.flat.steps(parameter, update, make)
        if self.joined is None:
            return make(update)
        return self.joined.own(parameter, make(self.joined.whole(parameter, update)))


def _torchs_step(update: Tensor, group: dict[str, Any]) -> Tensor:
    """Return the step of torch.optim.Muon at learning rate 1, from 0 and without memory, against an update."""
    start = torch.zeros_like(update)
    start.grad = update
    kept = {name: group[name] for name in ("ns_coefficients", "eps", "ns_steps", "adjust_lr_fn")}
    _step_unseen(torch.optim.Muon([start], lr=1.0, weight_decay=0.0, momentum=0.0, nesterov=False, **kept))
    return start


def _step_unseen(muon: torch.optim.Muon) -> None:
    """Make the step of torch.optim.Muon inside one whose hooks are called already; those of all optimizers, too."""
    (unwrapped(torch.optim.Muon.step) or torch.optim.Muon.step)(muon)


def _exact_step(update: Tensor, group: dict[str, Any]) -> Tensor:
    """Return the same in the precision of the update, float32 at least."""
    rows, columns = update.shape
    orthogonal = newton_schulz(update, group["ns_coefficients"], steps=group["ns_steps"], eps=group["eps"])
    original = math.sqrt(max(1.0, rows / columns))
    size = original if group["adjust_lr_fn"] == "original" else 0.2 * math.sqrt(max(rows, columns))
    return orthogonal.to(update.dtype).mul_(-size)


def newton_schulz(matrix: Tensor, coefficients: tuple[float, float, float], *, steps: int, eps: float) -> Tensor:
    """Return the matrix with the same singular vectors, and singular values near 1.

    Each step maps every singular value s to a·s + b·s³ + c·s⁵, after a division by the Frobenius norm, which is taken
    as `eps` at least. After Keller Jordan's Muon, https://kellerjordan.github.io/posts/muon, in float32 or above.
    """
    a, b, c = coefficients
    wide = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
    x = wide.mT if matrix.size(0) > matrix.size(1) else wide
    x = x / x.norm().clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if matrix.size(0) > matrix.size(1) else x
