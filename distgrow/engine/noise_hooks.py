"""What an update shows of gradient noise at no gradient evaluations; knows the model's parameters, but no engine.

A gradient is seen twice: in parts, as backward hands them over, and whole, as the optimizer is about to take it. In
between an engine may accumulate, average over ranks, clip and shard it as it likes.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from distgrow.core.plan import Plan
from distgrow.optim import Optimizer
from distgrow.optim.sgd import SGD

#: What norms of half-precision gradients are computed in.
_WIDER = {torch.float16: torch.float32, torch.bfloat16: torch.float32}
#: Elements of the largest tensors whose inner product is taken at once: BLAS counts in 32 bits.
_PIECE = 2**30
#: What plain SGD keeps of its last step, by its name in the optimizer's state and so in checkpoints.
_KEPT = "direction"


class Parts:
    """Σ n_i|g_i|²/B over this rank's micro-batches, by hooks on the model's parameters.

    A hook on a leaf sees the gradient of one backward alone, before it is added to what is there. It sees
    h_i = w_i·g_i with w_i = n_i·world/B (Plan.weight), so a part's share in the sum is |h_i|²/(w_i·world).
    """

    def __init__(self, parameters: Iterable[nn.Parameter], world: int) -> None:
        self._parameters = [parameter for parameter in parameters if parameter.requires_grad]
        self._world = world
        self._hooks: list[RemovableHandle] = []  # none where an update is not measured
        self._norms: list[Tensor] = []  # of the micro-batch under way, one a parameter
        self._shares: list[Tensor] = []  # |h_i|²/(w_i·world)
        self._nothing = torch.tensor(math.nan)

    def begin(self, plan: Plan) -> None:
        """An update begins: forget the last one, and look on where this one is measured."""
        self._norms.clear()
        self._shares.clear()
        if plan.window and not self._hooks:
            self._hooks = [parameter.register_hook(self._see) for parameter in self._parameters]
        elif not plan.window and self._hooks:
            for hook in self._hooks:
                hook.remove()
            self._hooks.clear()

    def _see(self, gradient: Tensor) -> None:
        self._norms.append(torch.linalg.vector_norm(gradient, dtype=_WIDER.get(gradient.dtype)))

    @property
    def whole(self) -> bool:
        """Whether the gradients of all parameters have been seen of the micro-batch under way."""
        return len(self._norms) == len(self._parameters)

    def end(self, weight: float, scale: float = 1.0) -> None:
        """A micro-batch's backward is over; its mean loss had been multiplied by `weight` and a loss scale."""
        if self._norms:
            norm = torch.linalg.vector_norm(torch.stack(self._norms))
            self._shares.append(norm.square().div_(weight * scale**2 * self._world))
            self._norms.clear()

    def share(self) -> Tensor:
        """This rank's term of the sum over ranks, a tensor of no dimension; NaN where nothing was seen."""
        return torch.stack(self._shares).sum() if self._shares else self._nothing


class Direction:
    """What an optimizer is about to step along, held against the parameters and against its step before.

    SGD's weight decay is the L2 penalty (λ/2)|θ|², part of the objective: it adds λθ to every gradient. The direction
    u of a step is, of plain SGD, the gradient that it took, of which a copy is kept in the optimizer's state; with
    momentum its buffer; of AdamW m̂/(√v̂ + ε). AdamW's decoupled decay is part of neither.
    """

    def __init__(self, spec: Optimizer) -> None:
        self._spec, self._clip = spec, spec.clip
        self._penalty = spec.penalty
        self._keeps = isinstance(spec, SGD) and spec.momentum == 0
        self._penalised = self._product = False
        self._terms: dict[str, list[Tensor]] = {}  # of inner products of g, p = θ and u

    def begin(self, plan: Plan) -> None:
        """An update begins: forget the last one, and look on at the step where that is of use."""
        self._penalised, self._product = self._penalty > 0 and plan.window > 0, plan.product
        self._terms = {"gp": [], "pp": [], "gu": [], "pu": []}

    @property
    def wanted(self) -> bool:
        """Whether this update's step has to be looked at."""
        return self._penalised or self._product

    @torch.no_grad()
    def look(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Before a step of `optimizer`, whose gradients are mean gradients, clipped; fit for a hook on its steps.

        Of ZeRO's it sees this rank's shards, in several steps where they are several.
        """
        if not self.wanted:
            return
        for group in optimizer.param_groups:
            given = [parameter for parameter in group["params"] if parameter.grad is not None]
            if self._penalised:
                self._terms["gp"] += [inner(p.grad, p) for p in given]
                self._terms["pp"] += [inner(p, p) for p in given]
            if self._product:
                self._hold_against_last(optimizer, group, given)
                self._keep(optimizer, given)

    def _hold_against_last(self, optimizer: torch.optim.Optimizer, group: dict[str, Any], given: list[Any]) -> None:
        stepped = [p for p in given if optimizer.state.get(p)]
        for p, last in zip(stepped, self._last([optimizer.state[p] for p in stepped], group), strict=True):
            self._terms["gu"].append(inner(p.grad, last))
            if self._penalty:
                self._terms["pu"].append(inner(p, last))

    def _last(self, states: Sequence[dict[str, Any]], group: dict[str, Any]) -> Iterator[Tensor]:
        """u of every parameter, given its state."""
        if isinstance(self._spec, SGD):
            yield from (state[_KEPT if self._keeps else "momentum_buffer"] for state in states)
            return
        for state, steps in zip(states, _steps(states, group), strict=True):
            mean, square = _real(state["exp_avg"]), _real(state["exp_avg_sq"])
            root = square.sqrt().div_(math.sqrt(1 - self._spec.beta2**steps)).add_(self._spec.eps)
            yield torch.div(mean, root, out=root).div_(1 - self._spec.beta1**steps)

    def _keep(self, optimizer: torch.optim.Optimizer, given: list[Any]) -> None:
        if not self._keeps or not given:
            return
        states = [optimizer.state[p] for p in given]
        for p, state in zip(given, states, strict=True):
            if _KEPT not in state:
                state[_KEPT] = torch.empty_like(p)
        kept = [state[_KEPT] for state in states]
        torch._foreach_copy_(kept, [p.grad for p in given])  # pyright: ignore[reportPrivateImportUsage]
        if self._penalty:
            torch._foreach_add_(kept, given, alpha=self._penalty)  # pyright: ignore[reportPrivateImportUsage]

    def copies(self, plan: Plan) -> int:
        """How many copies of the parameters' size are kept for it."""
        return int(self._keeps and plan.product)

    def found(self, grad_norm: float) -> tuple[float, float]:
        """What the penalty adds to squared norms, 2λ⟨g, θ⟩ + λ²|θ|², and ⟨g + λθ, u⟩; of the shards seen here.

        g is the gradient before clipping, `grad_norm` its norm. The second is NaN where there was no step before.
        """
        clipped = 1.0 if self._clip is None else min(1.0, self._clip / (grad_norm + 1e-6))
        sums = {name: sum(torch.stack(terms).tolist()) if terms else 0.0 for name, terms in self._terms.items()}
        product = sums["gu"] / clipped + self._penalty * sums["pu"] if self._terms["gu"] else math.nan
        return self._penalty * (2 * sums["gp"] / clipped + self._penalty * sums["pp"]), product


def inner(one: Tensor, other: Tensor) -> Tensor:
    """⟨one, other⟩ of two tensors with as many elements, a complex one counting as two."""
    one, other = _real(one).reshape(-1), _real(other).reshape(-1)
    if one.numel() <= _PIECE:
        return torch.dot(one, other)
    return torch.stack([torch.dot(a, b) for a, b in zip(one.split(_PIECE), other.split(_PIECE), strict=True)]).sum()


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def _steps(states: Sequence[dict[str, Any]], group: dict[str, Any]) -> list[float]:
    """How many steps each parameter of a group has taken, as Adams of several makes write it down."""
    found: list[Any] = [state.get("step", group.get("step")) for state in states]
    return torch.stack(found).tolist() if found and isinstance(found[0], Tensor) else found
