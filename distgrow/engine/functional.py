"""FunctionalObjective: model and loss at one moment, with derivatives; nothing done with it moves training.

It works on a copy without tensors, which are lent to it at each call: no module that trains changes its
mode, no hook of DDP or DeepSpeed fires, no `.grad` is written.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from distgrow.core.errors import ConfigError
from distgrow.distributed.world import World
from distgrow.engine.batches import place
from distgrow.engine.objective import WeightedLoss
from distgrow.optim.direction import real

Vector = list[Tensor]

_NO_SECOND = ("is not implemented", "double backward", "differentiate twice", "use_reentrant=True")


class _Gradient(nn.Module):
    """Differentiate an objective within one call, for activation checkpointing computes forward again in backward."""

    def __init__(self, objective: WeightedLoss, penalty: float) -> None:
        super().__init__()
        self.objective, self.penalty = objective, penalty

    def forward(self, batch: Any, parameters: Vector, along: Vector | None) -> tuple[Tensor, Vector]:
        """Return the mean loss and its gradient or, given a vector, the product of its Hessian with that.

        The gradient is by way of `.grad` of the parameters, which are lent for this: reentrant checkpointing knows no
        other way.
        """
        loss = self.objective(batch, 1.0)
        value = loss.detach()
        if self.penalty:
            loss = loss + self.penalty / 2 * torch.stack([real(p).square().sum() for p in parameters]).sum()
        if along is None:
            loss.backward()
            gradient = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
            for parameter in parameters:
                parameter.grad = None
            return value, gradient
        gradient = _grad(loss, parameters, create_graph=True)
        products = [(real(g) * real(v)).sum() for g, v in zip(gradient, along, strict=True)]
        if not (product := torch.stack(products).sum()).requires_grad:  # linear in all of θ
            return value, [torch.zeros_like(v) for v in along]
        return value, _grad(product, parameters)


class FunctionalObjective:
    """Hold f(θ) = mean loss + (λ/2)|θ|² at one θ, in eval mode and at least single precision, batch by batch."""

    def __init__(
        self,
        objective: WeightedLoss | ConfigError,
        *,
        parameters: Mapping[str, Tensor],
        buffers: Mapping[str, Tensor],
        penalty: float,
        world: World,
    ) -> None:
        """Lend tensors to an empty copy of model and loss. Collective: every rank must call.

        Args:
            objective: What `empty_copy` gave.
            parameters: Those of the WeightedLoss that it is a copy of, by their names.
            buffers: The same; the first rank's are taken.
            penalty: λ.
            world: The ranks.

        Raises:
            ConfigError: There was no copy.
        """
        if isinstance(objective, ConfigError):
            raise objective
        self._device = world.device
        trainable = {name for name, parameter in objective.named_parameters() if parameter.requires_grad}
        lent = {name: _single(tensor.detach()).requires_grad_(name in trainable) for name, tensor in parameters.items()}
        copied = {name: _single(tensor.detach()).clone() for name, tensor in buffers.items()}
        world.share(list(copied.values()))
        self._differentiated = _Gradient(objective, penalty)
        self._tensors = {f"objective.{name}": tensor for name, tensor in {**lent, **copied}.items()}
        self.parameters: Vector = [lent[name] for name in lent if name in trainable]  #: θ
        self._dtype = torch.float64 if self.parameters[0].dtype.to_real() == torch.float64 else None

    def gradient(self, batch: Any) -> tuple[Tensor, Vector]:
        """Return the batch's mean loss, and its gradient by θ with the penalty's λθ."""
        loss, gradient = self._call(batch, None)
        return loss, [g.detach() for g in gradient]

    def product(self, batch: Any, vector: Vector) -> Vector:
        """Return the Hessian of the batch's mean loss by θ, with the penalty's λ, times `vector`.

        Raises:
            ConfigError: The model has no second derivatives.
        """
        with _second_derivatives():
            return self._call(batch, vector)[1]

    def _call(self, batch: Any, along: Vector | None) -> tuple[Tensor, Vector]:
        placed = place(batch, self._device, self._dtype)
        return functional_call(self._differentiated, self._tensors, (placed, self.parameters, along))


def _grad(value: Tensor, parameters: Vector, *, create_graph: bool = False) -> Vector:
    """Differentiate a number by parameters; by those that it does not depend on the derivative is 0."""
    return list(
        torch.autograd.grad(value, parameters, create_graph=create_graph, materialize_grads=True, allow_unused=True)
    )


def _single(tensor: Tensor) -> Tensor:
    """Return a tensor in single precision if it has less."""
    narrow = tensor.is_floating_point() and tensor.element_size() < 4
    return tensor.float() if narrow else tensor


@contextmanager
def _second_derivatives() -> Iterator[None]:
    """Let attention take the one path that can be differentiated twice.

    Raises:
        ConfigError: Something else cannot be.
    """
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    except RuntimeError as error:
        if not any(words in str(error) for words in _NO_SECOND):
            raise
        raise ConfigError(
            f"run.probe.curvature=true needs second derivatives, which the model lacks: {error}; set it to false"
        ) from error
