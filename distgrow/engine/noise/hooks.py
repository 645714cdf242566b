"""Gradient noise of an update, measured at no gradient evaluations; knows the model's parameters, but no engine.

A gradient is seen twice: micro-batch by micro-batch, as backward hands it over, and whole, as the optimizer is about to
take it. In between an engine may accumulate, average over ranks, clip and shard it as it likes.
"""

import math
from collections.abc import Iterable, Sequence
from functools import partial
from itertools import chain, islice
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from distgrow.core.plan import Plan
from distgrow.engine.noise.metric import Roots, in_metric
from distgrow.optim import OptimizerSpec
from distgrow.optim.at_growth import CORRECTION
from distgrow.optim.direction import real

#: What norms of half-precision gradients are computed in.
_WIDER = {torch.float16: torch.float32, torch.bfloat16: torch.float32}
#: Elements of the largest tensors whose inner product is taken at once: BLAS counts in 32 bits.
_PIECE = 2**30


class MicroBatchNorms:
    """Add up Σ n_i|g_i|²/B over this rank's micro-batches, by hooks on the model's parameters.

    A hook on a leaf sees the gradient of one backward alone, before it is added to what is there. It sees
    h_i = w_i·g_i with w_i = n_i·world/B (Plan.weight), so micro-batch i adds |h_i|²/(w_i·world) to the sum.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], world: int, *, each: bool = False) -> None:
        """Take the parameters; `each`: the sum is wanted for each of them too."""
        self.parameters = [parameter for parameter in parameters if parameter.requires_grad]
        self._world, self._always_each, self._each = world, each, each
        self._roots: Roots | None = None
        self._hooks: list[RemovableHandle] = []  # none while updates are not measured
        self._norms: dict[int, Tensor] = {}  # of the micro-batch under way, by a parameter's number
        self._squares: list[Tensor] = []  # |h_i|²/(w_i·world)
        self._each_squares: list[Tensor] = []  # the same, one a parameter

    def begin(self, plan: Plan, roots: Roots | None = None) -> None:
        """Forget the last update, and set hooks if this one is measured, else remove them.

        Args:
            plan: The update's.
            roots: √P of each parameter, if the plan asks for norms in that metric. Until it is known, nothing is
                measured.
        """
        self._each = self._always_each or plan.by_parameter
        self._roots, measured = roots, plan.window > 0 and (roots is not None or not plan.preconditioned)
        self._norms.clear()
        self._squares.clear()
        self._each_squares.clear()
        if measured and not self._hooks:
            self._hooks = [p.register_hook(partial(self._see, k)) for k, p in enumerate(self.parameters)]
        elif not measured and self._hooks:
            self.close()

    def close(self) -> None:
        """Remove the hooks."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _see(self, number: int, gradient: Tensor) -> None:
        if self._roots is None:
            self._norms[number] = _norm(gradient)
        elif (root := self._roots[number]) is not None:
            self._norms[number] = _norm(in_metric(gradient, root))

    @property
    def complete(self) -> bool:
        """Return whether the gradients of all parameters have been seen of the micro-batch under way."""
        known = len(self.parameters) if self._roots is None else sum(root is not None for root in self._roots)
        return len(self._norms) == known

    def end(self, weight: float, scale: float = 1.0) -> None:
        """End a micro-batch; `weight` and the loss scale `scale` are what its mean loss was multiplied by."""
        if self._norms and weight:  # one without items adds nothing
            norm, share = (
                torch.linalg.vector_norm(torch.stack([*self._norms.values()])),
                weight * scale**2 * self._world,
            )
            self._squares.append(norm.square().div_(share))
            if self._each:
                unseen = norm if len(self._norms) == len(self.parameters) else torch.zeros_like(norm)
                norms = [self._norms.get(k, unseen) for k in range(len(self.parameters))]
                self._each_squares.append(torch.stack(norms).square_().div_(share))
        self._norms.clear()

    def total(self) -> Tensor | None:
        """Return this rank's term of the sum over ranks, without dimensions; None if nothing was seen."""
        return torch.stack(self._squares).sum() if self._squares else None

    def totals(self) -> Tensor:
        """Return `total` of each parameter apart, where `each` is wanted; zeros if nothing was seen."""
        if not self._each_squares:
            return torch.zeros_like(_norm(self.parameters[0].detach())).expand(len(self.parameters)).contiguous()
        return torch.stack(self._each_squares).sum(0)


class Sums(NamedTuple):
    """Hold inner products of g, p = θ and u, added up over parameters."""

    gp: float
    pp: float
    gu: float
    pu: float
    tested: bool  #: whether there was a step before, with the direction u


#: Those of a step that was not looked at.
NO_SUMS = Sums(0.0, 0.0, 0.0, 0.0, tested=False)


class StepProducts:
    """Hold an optimizer's step against the parameters and against the step before it, by inner products.

    SGD's weight decay is the L2 penalty (λ/2)|θ|², part of the objective: it adds λθ to every gradient.
    """

    def __init__(self, spec: OptimizerSpec) -> None:
        self._clip, self._l2, self._direction = spec.clip, spec.l2, spec.direction()
        self._penalised = self._product = False
        self._terms: dict[str, list[Tensor]] = {}  # of inner products of g, p = θ and u
        self._sums: Sums | None = None

    def watch(self, optimizer: torch.optim.Optimizer) -> None:
        """Look at every step of `optimizer` from now on, where the engine does not step it itself.

        Of ZeRO's it sees this rank's shards, in several steps if they are several.
        """
        optimizer.register_step_pre_hook(self.before_step)
        optimizer.register_step_post_hook(self.after_step)

    def begin(self, plan: Plan) -> None:
        """Forget the last update, and look at the coming step if that is of use."""
        self._penalised, self._product = self._l2 and plan.window > 0, plan.product
        self._terms, self._sums = {"gp": [], "pp": [], "gu": [], "pu": []}, None

    @property
    def wanted(self) -> bool:
        """Return whether this update's step has to be looked at."""
        return self._penalised or self._product

    def before_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Look at the gradients, mean and clipped, that a step is about to take."""
        if self.wanted:
            self._look_before(optimizer)

    @torch.no_grad()
    def _look_before(self, optimizer: torch.optim.Optimizer) -> None:
        for group in optimizer.param_groups:
            given, penalty = _stepping(group), self._penalty(group)
            if self._penalised and penalty:
                self._terms["gp"] += [penalty * inner(p.grad, p) for p in given]
                self._terms["pp"] += [penalty**2 * inner(p, p) for p in given]
            if self._product and given:
                states = [optimizer.state[p] for p in given]
                self._hold_against_last(given, states, group)
                self._direction.before_step(given, states, penalty)

    def _penalty(self, group: dict[str, Any]) -> float:
        """Return λ of a group's L2 penalty."""
        return group["weight_decay"] if self._l2 else 0.0

    def _hold_against_last(self, given: list[Any], states: list[Any], group: dict[str, Any]) -> None:
        known = [k for k, state in enumerate(states) if self._direction.known(state)]
        directions = self._direction.last([states[k] for k in known], group)
        penalty, scale = self._penalty(group), group.get("lr_scale", 1.0) * group.get(CORRECTION, 1.0)
        for k, last in zip(known, directions, strict=True):
            self._terms["gu"].append(scale * inner(given[k].grad, last))
            if penalty:
                self._terms["pu"].append(scale * penalty * inner(given[k], last))

    def after_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Look at what a step has done."""
        if self._product:
            self._look_after(optimizer)

    @torch.no_grad()
    def _look_after(self, optimizer: torch.optim.Optimizer) -> None:
        for group in optimizer.param_groups:
            if given := _stepping(group):
                self._direction.after_step(given, [optimizer.state[p] for p in given], group["lr"])

    def copies(self, plan: Plan) -> int:
        """Return how many tensors of the parameters' size are kept for `plan`."""
        return self._direction.copies if plan.product else 0

    def fetch(self) -> Sums:
        """Return the inner products, added up over parameters. Waits for a GPU the first time it is called."""
        if not self.wanted:
            return NO_SUMS
        if self._sums is None:
            terms = self.terms()
            self._sums = summed(torch.stack(flat).tolist() if (flat := [*chain(*terms)]) else [], terms)
        return self._sums

    def terms(self) -> list[list[Tensor]]:
        """Return the inner products of each parameter, in the order of Sums."""
        return [*self._terms.values()]

    def results(self, sums: Sums, grad_norm: float) -> tuple[float, float]:
        """Return what the penalty adds to squared norms, and the product with the last step, of the shards seen here.

        With g the gradient before clipping and `grad_norm` its norm, these are 2λ⟨g, θ⟩ + λ²|θ|² and ⟨g + λθ, u⟩. The
        second is NaN if there was no step before.
        """
        clipped = 1.0 if self._clip is None else min(1.0, self._clip / (grad_norm + 1e-6))
        product = sums.gu / clipped + sums.pu if sums.tested else math.nan
        return 2 * sums.gp / clipped + sums.pp, product


def summed(values: Sequence[float], terms: Sequence[Sequence[Tensor]]) -> Sums:
    """Return the sums of inner products, whose `values` are those of `terms` one after the other."""
    numbers = iter(values)
    gp, pp, gu, pu = (sum(islice(numbers, len(part))) for part in terms)
    return Sums(gp, pp, gu, pu, tested=len(terms[2]) > 0)


def _norm(gradient: Tensor) -> Tensor:
    """Return the norm in single precision at least."""
    return torch.linalg.vector_norm(gradient, dtype=_WIDER.get(gradient.dtype))


def _stepping(group: dict[str, Any]) -> list[Any]:
    """Return the parameters of a group that a step moves: none if its learning rate is always 0."""
    if group.get("lr_scale") == 0:
        return []
    return [parameter for parameter in group["params"] if parameter.grad is not None]


def inner(one: Tensor, other: Tensor) -> Tensor:
    """Return ⟨one, other⟩ of two tensors with as many elements; a complex one counts as two."""
    one, other = real(one).reshape(-1), real(other).reshape(-1)
    if one.numel() <= _PIECE:
        return torch.dot(one, other)
    return torch.stack([torch.dot(a, b) for a, b in zip(one.split(_PIECE), other.split(_PIECE), strict=True)]).sum()
