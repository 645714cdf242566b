"""Extrapolation: moves the parameters to the point where a gradient is evaluated, and back; knows no engine."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from distgrow.core.counted import counted
from distgrow.core.errors import ConfigError
from distgrow.core.extrapolate import Extrapolate
from distgrow.core.order import mix_int
from distgrow.core.plan import Plan
from distgrow.engine.batches import Buffers, memory_for
from distgrow.engine.objective import WeightedLoss
from distgrow.optim import OptimizerSpec
from distgrow.optim.direction import real

_SALT = 0xE7A  #: keeps a shift's random numbers apart from those of dropout
_REMEDY = "leave out extrapolate, or use a smaller model"

#: A tensor for each parameter, None for one without a gradient.
Gradient = list[Tensor | None]


class Extrapolation:
    """Shift the parameters by −γ̂·s for the gradient of an update, and give them back to the last bit.

    s is a gradient, in the metric of the optimizer's steps if that has one (AdamW), or random directions. A group's
    `lr_scale` multiplies what a gradient shifts. Momentum and penalties are the optimizer's own: they act at θ.
    """

    def __init__(
        self, spec: Extrapolate, optimizer_spec: OptimizerSpec, optimizer: Any, objective: WeightedLoss
    ) -> None:
        """Begin without a past gradient.

        Args:
            spec: What the shift is.
            optimizer_spec: Tells the metric of the optimizer's steps.
            optimizer: Its state holds that metric, which is read and never moved.
            objective: Model and loss. Its parameters with a gradient are shifted.
        """
        self.spec, self._optimizer, self._metric = spec, optimizer, optimizer_spec.preconditioner()
        self.parameters = self._parameters = [p for p in objective.trained() if p.requires_grad]
        self._kept: list[Tensor] = []  # values of the parameters while they are shifted
        self._source: Gradient = [None] * len(self._parameters)
        self._buffers = Buffers(objective) if spec.group is not None and spec.kind == "fresh" else None
        self._plan: Plan | None = None  # of the update under way, inside `held`
        self._group = 0  # of rows, of the global batch: the next one

    @property
    def missing(self) -> int:
        """Return how many tensors a parameter is still to have beside its gradient."""
        known = len(self._kept) > 0
        return (not known) + (all(value is None for value in self._source)) + (self._metric is not None)

    # ── the parameters of an update ─────────────────────────────────────────────────────────────────────────────

    @contextmanager
    def held(self, plan: Plan, rank: int) -> Iterator[None]:
        """Shift the parameters inside the context, or let `at_group` do so; afterwards they are what they were.

        Args:
            plan: The update's.
            rank: Whose part of the batch is evaluated.

        Raises:
            ConfigError: The micro-batches are not the groups.
        """
        self._check(plan)
        with torch.no_grad(), memory_for("the parameters beside their shift", _REMEDY):
            values = [parameter.detach() for parameter in self._parameters]
            self._kept = _copied(self._kept, values)
        self._plan, self._group = plan, rank * plan.accum
        try:
            if self.spec.group is None:
                self._shift(self._directions(0))
            yield
        finally:
            self._plan = None
            self._restore()

    def at_group(self, loss: Callable[[], Tensor] | None) -> None:
        """Shift the parameters for the next micro-batch, if it is a group with a shift of its own; see `held`.

        Args:
            loss: Computes the micro-batch's mean loss. None: it counts nothing.
        """
        if self._plan is None or self.spec.group is None:
            return
        self._restore()
        if self._buffers is not None:
            self._source = [None] * len(self._parameters) if loss is None else self._evaluated(loss, self._buffers)
        self._shift(self._directions(self._group))
        self._group += 1

    def _evaluated(self, loss: Callable[[], Tensor], buffers: Buffers) -> Gradient:
        """Return the gradient of a micro-batch's loss; buffers and random numbers are as before."""
        device = self._parameters[0].device
        buffers.keep()
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            found = torch.autograd.grad(loss(), self._parameters, allow_unused=True)
        buffers.restore()
        return list(found)

    def _check(self, plan: Plan) -> None:
        group = self.spec.group
        if group is not None and (plan.micro != group or plan.batch != group * plan.parts):
            raise ConfigError(
                f"extrapolate.group={group} rows are a micro-batch, but {counted(plan.batch, 'row')} on "
                f"{counted(plan.world, 'rank')} come in micro-batches of up to {plan.micro}, perhaps as memory holds "
                "no more: lower extrapolate.group"
            )

    # ── the gradient that shifts ────────────────────────────────────────────────────────────────────────────────

    def take(self, own: Gradient | None = None) -> None:
        """Keep a gradient for the next shift: `own`, or copies of those that the parameters have now."""
        if own is not None:
            self._source = own
            return
        pairs = zip((parameter.grad for parameter in self._parameters), self._source, strict=True)
        with memory_for("the gradient that shifts the parameters", _REMEDY):
            self._source = [
                None if now is None else now.clone() if place is None else place.copy_(now) for now, place in pairs
            ]

    def forget(self) -> None:
        """Drop what `take` has kept: nothing is shifted until it is called again."""
        self._source = [None] * len(self._parameters)

    def state(self) -> Gradient:
        """Return the gradient that `take` has kept."""
        return self._source

    def load(self, state: Sequence[Tensor | None]) -> None:
        """Take over what `state` returned.

        Raises:
            ValueError: It is of other parameters.
        """
        shapes = [parameter.shape for parameter in self._parameters]
        found = [shape if value is None else value.shape for value, shape in zip(state, shapes, strict=True)]
        if found != shapes:
            raise ValueError("it holds a past gradient of other parameters")
        self._source = list(state)

    # ── the shift ───────────────────────────────────────────────────────────────────────────────────────────────

    @torch.no_grad()
    def _restore(self) -> None:
        torch._foreach_copy_(self._parameters, self._kept)  # pyright: ignore[reportPrivateImportUsage, reportArgumentType]

    @torch.no_grad()
    def _shift(self, directions: dict[nn.Parameter, tuple[float, Tensor]]) -> None:
        """Subtract γ̂ times a factor times a direction from each parameter that has one."""
        for factor in {factor for factor, _ in directions.values()}:
            pairs = [(p, direction) for p, (own, direction) in directions.items() if own == factor]
            moved, by = [real(p) for p, _ in pairs], [real(direction) for _, direction in pairs]
            torch._foreach_add_(moved, by, alpha=-self.spec.rate * factor)  # pyright: ignore[reportPrivateImportUsage]

    def _directions(self, group: int) -> dict[nn.Parameter, tuple[float, Tensor]]:
        """Return a factor and a direction for each parameter that is shifted."""
        with torch.no_grad(), memory_for("the shift of the parameters", _REMEDY):
            if self.spec.kind == "noise":
                assert self._plan is not None
                seed = mix_int(mix_int(self._plan.seed, _SALT), group)
                return dict(zip(self._parameters, ((1.0, d) for d in directions_like(self._kept, seed)), strict=True))
            gradients = dict(zip(self._parameters, self._source, strict=True))
            known = {p: gradient for p, gradient in gradients.items() if gradient is not None}
            return self._in_metric(known)

    def _in_metric(self, gradients: dict[nn.Parameter, Tensor]) -> dict[nn.Parameter, tuple[float, Tensor]]:
        """Return each group's `lr_scale`, and P·g if the optimizer's steps are −η·P·g and have begun."""
        found: dict[nn.Parameter, tuple[float, Tensor]] = {}
        for group in self._optimizer.param_groups:
            given, factor = [p for p in group["params"] if p in gradients], group.get("lr_scale", 1.0)
            if self._metric is None:
                found |= {p: (factor, gradients[p]) for p in given}
                continue
            begun = [p for p in given if self._optimizer.state.get(p)]
            scales = self._metric([self._optimizer.state[p] for p in begun], group)
            found |= {p: (factor, scale.mul_(real(gradients[p]))) for p, scale in zip(begun, scales, strict=True)}
        return found


def directions_like(tensors: Sequence[Tensor], seed: int) -> Iterator[Tensor]:
    """Yield a random direction for each tensor, of the tensor's norm in every filter.

    A filter is what belongs to one output: an index of the first dimension. A tensor of fewer than two dimensions is
    one filter.
    """
    generator = torch.Generator(tensors[0].device).manual_seed(seed)
    for tensor in tensors:
        drawn = torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype, device=tensor.device)
        dims = tuple(range(1, tensor.dim())) or None
        length, wanted = (torch.linalg.vector_norm(each, dim=dims, keepdim=True) for each in (drawn, tensor))
        yield drawn.mul_((wanted / length).nan_to_num_(0.0, 0.0, 0.0))


def _copied(into: Sequence[Tensor], values: Sequence[Tensor]) -> list[Tensor]:
    """Return copies of the values, in the memory of older ones if there are any."""
    if not into:
        return [value.clone() for value in values]
    torch._foreach_copy_(list(into), list(values))  # pyright: ignore[reportPrivateImportUsage]
    return list(into)
