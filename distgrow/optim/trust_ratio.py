"""LARS, LAMB and CLARS as torch optimizers. Each scales a parameter's step by ϑ‖w‖ over a norm of its gradient."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from distgrow.optim.base import parameters_of
from distgrow.optim.direction import real
from distgrow.optim.layerwise import TRUSTED

Group = dict[str, Any]
#: What CLARS keeps of the norms it was told: numbers that are wider than parameters in half precision.
_MEANS = ("square_sum", "square_weight")


class _TrustRatio(torch.optim.Optimizer, ABC):
    """Step group by group; a subclass gives `_step`."""

    def __init__(self, groups: list[Group], **settings: Any) -> None:
        super().__init__(groups, {"lr": 0.0, "weight_decay": 0.0, "max_ratio": None, TRUSTED: True, **settings})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Make one step."""
        for group in self.param_groups:
            given = [parameter for parameter in group["params"] if parameter.grad is not None]
            if given:
                self._step(given, group)

    @abstractmethod
    def _step(self, given: list[Tensor], group: Group) -> None:
        """Step the parameters of one group, which all have a gradient."""

    def _momentum(self, given: list[Tensor], steps: list[Tensor], group: Group) -> list[Tensor]:
        """Return v ← m·v + step, which begins as the first step; the step itself if m is 0."""
        if not group["momentum"]:
            return steps
        for parameter, step in zip(given, steps, strict=True):
            kept = self.state[parameter].get("momentum_buffer")
            self.state[parameter]["momentum_buffer"] = (
                step.clone() if kept is None else kept.mul_(group["momentum"]).add_(step)
            )
        return [self.state[parameter]["momentum_buffer"] for parameter in given]


class LARS(_TrustRatio):
    """λ = ϑ‖w‖/(‖g‖ + β‖w‖ + ε), v ← m·v + λ(g + βw), w ← w − γv, with λ = 1 if ‖w‖ or ‖g‖ is 0.

    Source: You et al., arXiv 1708.03888, in the form whose v does not remember older learning rates.
    """

    def _step(self, given: list[Tensor], group: Group) -> None:
        gradients, decay = _gradients(given), group["weight_decay"]
        steps = _decayed(gradients, given, decay)
        if group[TRUSTED]:
            size, gradient = _norms(given), _norms(gradients)
            ratio = group["trust"] * size / (gradient + decay * size + group["eps"])
            steps = _scaled(steps, _limited(ratio, size * gradient == 0, group))
        _move(given, self._momentum(given, steps, group), group["lr"])


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
        whole = _norms([parameter.grad for parameter in parts_sq]).div_(clipped).square_()
        between = torch.stack(list(parts_sq.values())) - whole
        variance = between.mul_(batch / (parts - 1))  # tr Σ without bias, whatever sizes the parts have
        squares = whole + variance * (1 - 1 / batch)  # |G|² + tr Σ with |G|² = |g|² − tr Σ/batch
        for parameter, square in zip(parts_sq, squares.unbind(), strict=True):
            state = self.state[parameter]
            for key, new in zip(_MEANS, (batch * square, torch.full_like(square, batch)), strict=True):
                state[key] = state[key].mul_(keep).add_(new) if key in state else new

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
        gradients = _gradients(given)
        steps = self._momentum(given, _decayed(gradients, given, group["weight_decay"]), group)
        if group[TRUSTED]:
            size, spread = _norms(given), self._spread(given, gradients)
            ratio = group["trust"] * size / (spread + group["eps"])
            steps = _scaled(steps, _limited(ratio, size * spread == 0, group))
        _move(given, steps, group["lr"])

    def _spread(self, given: list[Tensor], gradients: list[Tensor]) -> Tensor:
        """Return a, one number a parameter."""
        norms = _norms(gradients).unbind()
        states = [self.state[parameter] for parameter in given]
        seen = [(s["square_sum"] / s["square_weight"]).sqrt() if "square_sum" in s else None for s in states]
        return torch.stack([norm if a is None else a for a, norm in zip(seen, norms, strict=True)])


class LAMB(_TrustRatio):
    """r = m̂/(√v̂ + ε) + βw, w ← w − η(‖w‖/‖r‖)r, with the ratio 1 if ‖w‖ or ‖r‖ is 0.

    Source: You et al., arXiv 1904.00962, with both moments corrected for their beginning.
    """

    def _step(self, given: list[Tensor], group: Group) -> None:
        steps = [self._adam(parameter, group) for parameter in given]
        steps = _decayed(steps, given, group["weight_decay"])
        if group[TRUSTED]:
            size, step = _norms(given), _norms(steps)
            steps = _scaled(steps, _limited(size / step, size * step == 0, group))
        _move(given, steps, group["lr"])

    def _adam(self, parameter: Tensor, group: Group) -> Tensor:
        """Return m̂/(√v̂ + ε)."""
        gradient, state = real(parameter.grad), self.state[parameter]  # pyright: ignore[reportArgumentType]
        if "step" not in state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"] = torch.zeros_like(gradient)
            state["exp_avg_sq"] = torch.zeros_like(gradient)
        state["step"] += 1
        (beta1, beta2), mean, square = group["betas"], state["exp_avg"], state["exp_avg_sq"]
        mean.lerp_(gradient, 1 - beta1)
        square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        steps = state["step"].item()
        return mean / (1 - beta1**steps) / ((square / (1 - beta2**steps)).sqrt_().add_(group["eps"]))


def _gradients(given: list[Tensor]) -> list[Tensor]:
    return [real(parameter.grad) for parameter in given]  # pyright: ignore[reportArgumentType]


def _norms(tensors: list[Any]) -> Tensor:
    """Return the norm of each tensor, in single precision at least."""
    wider = torch.float32 if tensors[0].dtype in (torch.float16, torch.bfloat16) else None
    return torch.stack(torch._foreach_norm([real(t) for t in tensors], 2, wider))  # pyright: ignore[reportPrivateImportUsage]


def _decayed(steps: list[Tensor], given: list[Tensor], decay: float) -> list[Tensor]:
    """Return the steps plus βw; new tensors, unless β is 0."""
    if not decay:
        return steps
    return list(torch._foreach_add(steps, [real(p) for p in given], alpha=decay))  # pyright: ignore[reportPrivateImportUsage]


def _limited(ratio: Tensor, neutral: Tensor, group: Group) -> Tensor:
    """Return the trust ratios, 1 where `neutral`, and none above the group's limit."""
    return torch.where(neutral, 1.0, ratio).clamp(max=group["max_ratio"] or torch.inf)


def _scaled(steps: list[Tensor], ratios: Tensor) -> list[Tensor]:
    """Return new tensors: gradients are read again after a step."""
    return [step * ratio.to(step.dtype) for step, ratio in zip(steps, ratios.unbind(), strict=True)]


def _move(given: list[Tensor], steps: list[Tensor], lr: float) -> None:
    torch._foreach_add_([real(p) for p in given], steps, alpha=-lr)  # pyright: ignore[reportPrivateImportUsage]
