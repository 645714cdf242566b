"""LARS, LAMB and CLARS as torch optimizers. Each scales a parameter's step by ϑ‖w‖ over a norm of its gradient."""

import functools
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from distgrow.optim.base import parameters_of
from distgrow.optim.direction import real
from distgrow.optim.layerwise import TRUSTED
from distgrow.optim.layout import one_layout

if TYPE_CHECKING:
    from distgrow.optim.joined import Joined  # with Muon, which torch below 2.9 lacks

Group = dict[str, Any]
#: What CLARS keeps of the norms it was told: numbers that are wider than parameters in half precision.
_MEANS = ("square_sum", "square_weight")


class _TrustRatio(torch.optim.Optimizer, ABC):
    """Step group by group; a subclass gives `_step`."""

    joined: "Joined | None" = None  #: None: parameters are whole

    def __init__(self, groups: list[Group], **settings: Any) -> None:
        super().__init__(groups, {"lr": 0.0, "weight_decay": 0.0, "max_ratio": None, TRUSTED: True, **settings})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Make one step."""
        for group in self.param_groups:
            for given in _alike([parameter for parameter in group["params"] if parameter.grad is not None]):
                self._step(given, group)

    @abstractmethod
    def _step(self, given: list[Tensor], group: Group) -> None:
        """Step the parameters of one group, of one device and dtype, which all have a gradient."""

    def _buffers(self, given: list[Tensor], *keys: str) -> list[list[Tensor]]:
        """Return what the parameters keep under each key, as real tensors; zeros at their first step."""
        for parameter in given:
            state = self.state[parameter]
            if keys[0] not in state:
                state |= {key: torch.zeros_like(real(parameter)) for key in keys}
                self._begin(state, parameter)
        return [[self.state[parameter][key] for parameter in given] for key in keys]

    def _begin(self, state: dict[str, Any], parameter: Tensor) -> None:
        """Add what else a parameter keeps from its first step on."""

    def _norms(self, tensors: list[Any]) -> Tensor:
        """Return the norm of each whole tensor, in single precision at least."""
        norms = _norms(tensors)
        return norms if self.joined is None else self.joined.norms(norms)

    def _momentum(self, given: list[Tensor], steps: list[Tensor], group: Group, *, lr: float, decay: float) -> None:
        """Make SGD's step v ← m·v + step + βw, w ← w − γv; v begins as the first step."""
        momentum, weights = group["momentum"], [real(p) for p in given]
        kept = self._buffers(given, "momentum_buffer")[0] if momentum else []
        if not one_layout(weights, steps, kept):
            _move(given, _accumulated(kept, _decayed(steps, given, decay), momentum), lr)
            return
        torch._fused_sgd_(  # pyright: ignore[reportPrivateImportUsage]
            weights, steps, kept, weight_decay=decay, momentum=momentum, lr=lr, dampening=0.0, nesterov=False,
            maximize=False, is_first_step=False,
        )  # fmt: skip


class LARS(_TrustRatio):
    """λ = ϑ‖w‖/(‖g‖ + β‖w‖ + ε), v ← m·v + λ(g + βw), w ← w − γv, with λ = 1 if ‖w‖ or ‖g‖ is 0.

    Source: You et al., arXiv 1708.03888, in the form whose v does not remember older learning rates.
    """

    def _step(self, given: list[Tensor], group: Group) -> None:
        gradients, decay = _gradients(given), group["weight_decay"]
        if not group[TRUSTED]:
            self._momentum(given, gradients, group, lr=group["lr"], decay=decay)
            return
        size, gradient = self._norms(given), self._norms(gradients)
        ratio = group["trust"] * size / (gradient + decay * size + group["eps"])
        ratios = _limited(ratio, size * gradient == 0, group)
        steps = _scaled(_decayed(gradients, given, decay), ratios)
        self._momentum(given, steps, group, lr=group["lr"], decay=0.0)


class CLARS(_TrustRatio):
    """v ← m·v + g + βw, w ← w − γ(ϑ‖w‖/a)v. a is the root mean square of the norms of single samples' gradients.

    It is √(|G|² + tr Σ), for each parameter, of the means of what `see` was told. Until then a is ‖g‖.
    Source: Gao and Huang, arXiv 2002.01576, whose a is the mean of the norms over further samples.
    """

    def see(self, parts_sq: Mapping[Tensor, Tensor], *, batch: int, parts: int, keep: float, clipped: float) -> None:
        """Learn of the gradients of a batch's parts, before the step with its whole gradient.

        Args:
            parts_sq: Σ n_i|g_i|²/batch over the parts, of each parameter; n_i are a part's samples.
            batch: Samples of the batch.
            parts: How many; at least 2.
            keep: What the weights of earlier batches are multiplied by.
            clipped: What the gradients that the parameters have now were multiplied by.
        """
        whole = self._norms([parameter.grad for parameter in parts_sq]).div_(clipped).square_()
        between = torch.stack(list(parts_sq.values())) - whole
        variance = between.mul_(batch / (parts - 1))  # tr Σ without bias, whatever sizes the parts have
        squares = whole + variance * (1 - 1 / batch)  # |G|² + tr Σ with |G|² = |g|² − tr Σ/batch
        states = [self.state[parameter] for parameter in parts_sq]
        for key, new in zip(_MEANS, (batch * squares, torch.full_like(squares, batch)), strict=True):
            kept = [state.setdefault(key, torch.zeros_like(squares[0])) for state in states]
            torch._foreach_mul_(kept, keep)  # pyright: ignore[reportPrivateImportUsage]
            torch._foreach_add_(kept, new.unbind())  # pyright: ignore[reportPrivateImportUsage]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Load a state. torch rounds it to the precision of the parameters, but the means have a wider one."""
        super().load_state_dict(state_dict)
        indices = [index for group in state_dict["param_groups"] for index in group["params"]]
        for parameter, index in zip(parameters_of(self.param_groups), indices, strict=True):
            loaded = state_dict["state"].get(index, {})
            means = {key: loaded[key].to(parameter.device) for key in _MEANS if key in loaded}
            if means:
                self.state[parameter].update(means)

    def _step(self, given: list[Tensor], group: Group) -> None:
        gradients, decay = _gradients(given), group["weight_decay"]
        if not group[TRUSTED]:
            self._momentum(given, gradients, group, lr=group["lr"], decay=decay)
            return
        size, spread = self._norms(given), self._spread(given, gradients)
        ratio = group["trust"] * size / (spread + group["eps"])
        kept = self._buffers(given, "momentum_buffer")[0] if group["momentum"] else []
        steps = _accumulated(kept, _decayed(gradients, given, decay), group["momentum"])
        _move(given, _scaled(steps, _limited(ratio, size * spread == 0, group)), group["lr"])

    def _spread(self, given: list[Tensor], gradients: list[Tensor]) -> Tensor:
        """Return a, one number a parameter."""
        states = [self.state[parameter] for parameter in given]
        if all("square_sum" in state for state in states):
            sums, weights = (torch.stack([state[key] for state in states]) for key in _MEANS)
            return (sums / weights).sqrt()

        def one(state: dict[str, Tensor], norm: Tensor) -> Tensor:
            return (state["square_sum"] / state["square_weight"]).sqrt() if "square_sum" in state else norm

        return torch.stack(list(map(one, states, self._norms(gradients).unbind())))


class LAMB(_TrustRatio):
    """r = m̂/(√v̂ + ε) + βw, w ← w − η(‖w‖/‖r‖)r, with the ratio 1 if ‖w‖ or ‖r‖ is 0.

    Source: You et al., arXiv 1904.00962, with both moments corrected for their beginning.
    """

    def _step(self, given: list[Tensor], group: Group) -> None:
        decay = group["weight_decay"]
        if not group[TRUSTED]:
            self._adam([real(p) for p in given], given, group, lr=group["lr"], decay=decay)
            return
        weights = [real(p) for p in given]
        steps = [torch.zeros_like(w) for w in weights]
        self._adam(steps, given, group, lr=-1.0, decay=0.0)
        if decay:
            torch._foreach_add_(steps, weights, alpha=decay)  # pyright: ignore[reportPrivateImportUsage]
        size, step = self._norms([*weights, *steps]).chunk(2)
        ratios = _limited(size / step, size * step == 0, group)
        torch._foreach_mul_(steps, ratios.to(steps[0].dtype).unbind())  # pyright: ignore[reportPrivateImportUsage]
        _move(given, steps, group["lr"])

    def _begin(self, state: dict[str, Any], parameter: Tensor) -> None:
        state["step"] = torch.zeros((), device=parameter.device)

    def _adam(self, moved: list[Tensor], given: list[Tensor], group: Group, *, lr: float, decay: float) -> None:
        """Make the step w ← w − γ(m̂/(√v̂ + ε) + βw) of the tensors `moved`, with the moments of those given."""
        means, squares = self._buffers(given, "exp_avg", "exp_avg_sq")
        counts, gradients = [self.state[parameter]["step"] for parameter in given], _gradients(given)
        torch._foreach_add_(counts, 1.0)  # pyright: ignore[reportPrivateImportUsage]
        there = [moved, means, squares, gradients]
        alike = there if one_layout(*there) else [[t.contiguous() for t in tensors] for tensors in there]
        beta1, beta2 = group["betas"]
        torch._fused_adamw_(  # pyright: ignore[reportPrivateImportUsage]
            alike[0], alike[3], alike[1], alike[2], [], counts, lr=lr, beta1=beta1, beta2=beta2,
            weight_decay=decay, eps=group["eps"], amsgrad=False, maximize=False,
        )  # fmt: skip
        if alike is not there:
            for tensors, results in zip(there[:3], alike[:3], strict=True):
                torch._foreach_copy_(tensors, results)  # pyright: ignore[reportPrivateImportUsage]


def _alike(parameters: list[Tensor]) -> list[list[Tensor]]:
    """Return the parameters of each device and dtype apart: fused kernels take one of them."""
    found: dict[Any, list[Tensor]] = {}
    for parameter in parameters:
        found.setdefault((parameter.device, parameter.dtype), []).append(parameter)
    return list(found.values())


def _accumulated(kept: list[Tensor], steps: list[Tensor], momentum: float) -> list[Tensor]:
    """Return v ← m·v + step, kept; the steps themselves if m is 0."""
    if not momentum:
        return steps
    torch._foreach_mul_(kept, momentum)  # pyright: ignore[reportPrivateImportUsage]
    torch._foreach_add_(kept, steps)  # pyright: ignore[reportPrivateImportUsage]
    return kept


def _gradients(given: list[Tensor]) -> list[Tensor]:
    return [real(parameter.grad) for parameter in given]  # pyright: ignore[reportArgumentType]


def _norms(tensors: list[Any]) -> Tensor:
    """Return the norm of each tensor, in single precision at least."""
    tensors = [real(t) for t in tensors]
    wider = functools.reduce(torch.promote_types, {t.dtype for t in tensors}, torch.float32)
    return torch.stack(torch._foreach_norm(tensors, 2, wider))  # pyright: ignore[reportPrivateImportUsage]


def _decayed(steps: list[Tensor], given: list[Tensor], decay: float) -> list[Tensor]:
    """Return the steps plus βw; new tensors, unless β is 0."""
    if not decay:
        return steps
    return list(torch._foreach_add(steps, [real(p) for p in given], alpha=decay))  # pyright: ignore[reportPrivateImportUsage]


def _limited(ratio: Tensor, neutral: Tensor, group: Group) -> Tensor:
    """Return the trust ratios, 1 where `neutral`, and none above the group's limit."""
    return ratio.masked_fill(neutral, 1.0).clamp_(max=group["max_ratio"] or torch.inf)


def _scaled(steps: list[Tensor], ratios: Tensor) -> list[Tensor]:
    """Return new tensors: gradients are read again after a step, and momentum is kept."""
    return list(torch._foreach_mul(steps, ratios.to(steps[0].dtype).unbind()))  # pyright: ignore[reportPrivateImportUsage]


def _move(given: list[Tensor], steps: list[Tensor], lr: float) -> None:
    torch._foreach_add_([real(p) for p in given], steps, alpha=-lr)  # pyright: ignore[reportPrivateImportUsage]
