"""FunctionalObjective: model and loss at one moment, with derivatives; nothing done with it affects training.

It works on a copy without tensors. Each call lends tensors to the copy. So no module that trains changes its mode, no
hook of DDP or DeepSpeed runs, and no `.grad` is written.
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
    """Differentiate an objective within one call.

    One call is needed because activation checkpointing computes forward again in backward.
    """

    def __init__(self, objective: WeightedLoss, penalties: list[float]) -> None:
        super().__init__()
        self.objective, self.penalties = objective, penalties

    def forward(self, batch: Any, parameters: Vector, along: Vector | None) -> tuple[Tensor, Vector]:
        """Return the mean loss, and its gradient or a Hessian-vector product.

        The gradient is read from `.grad` of the lent parameters: reentrant checkpointing supports no other way.

        Args:
            batch: A batch on the device of the parameters.
            parameters: θ.
            along: The vector that the Hessian is multiplied by. None: return the gradient.
        """
        loss = self.objective(batch, 1.0)
        value = loss.detach()
        if any(self.penalties):
            squares = [w / 2 * real(p).square().sum() for w, p in zip(self.penalties, parameters, strict=True) if w]
            loss = loss + torch.stack(squares).sum()
        if along is None:
            loss.backward()
            gradient = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
            for parameter in parameters:
                parameter.grad = None
            return value, gradient
        gradient = _grad(loss, parameters, create_graph=True)
        products = [(real(g) * real(v)).sum() for g, v in zip(gradient, along, strict=True)]
        if not (product := torch.stack(products).sum()).requires_grad:  # the loss is linear in all of θ
            return value, [torch.zeros_like(v) for v in along]
        return value, _grad(product, parameters)


class FunctionalObjective:
    """Hold f(θ) = mean loss + Σ(λ/2)|θ|² at one θ, in eval mode and in single precision at least."""

    def __init__(
        self,
        objective: WeightedLoss | ConfigError,
        *,
        parameters: Mapping[str, Tensor],
        buffers: Mapping[str, Tensor],
        penalties: Mapping[str, float],
        world: World,
        masks: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Lend tensors to an empty copy of model and loss. Collective: every rank must call.

        Args:
            objective: The result of `empty_copy`.
            parameters: The parameters of the WeightedLoss that was copied, by name.
            buffers: Its buffers, by name. All ranks take those of the first rank.
            penalties: λ of each parameter's L2 penalty, by its name; 0 if it is not there.
            world: The ranks.
            masks: 0 for each number of a parameter that is no variable, else 1, by its name. None: all are.

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
        self._differentiated = _Gradient(objective, [penalties.get(name, 0.0) for name in lent if name in trainable])
        self._tensors = {f"objective.{name}": tensor for name, tensor in {**lent, **copied}.items()}
        self.parameters: Vector = [lent[name] for name in lent if name in trainable]  #: θ
        masks = masks or {}
        self._masks = [masks.get(name) for name in lent if name in trainable]
        self._dtype = torch.float64 if self.parameters[0].dtype.to_real() == torch.float64 else None

    def gradient(self, batch: Any) -> tuple[Tensor, Vector]:
        """Return the mean loss of the batch, and its gradient by θ including the penalty's λθ."""
        loss, gradient = self._call(batch, None)
        return loss, self._masked([g.detach() for g in gradient])

    def product(self, batch: Any, vector: Vector) -> Vector:
        """Return H·`vector`, H the Hessian by θ of the batch's mean loss including the penalty's λ.

        Raises:
            ConfigError: The model has no second derivatives.
        """
        with _second_derivatives():
            return self._masked(self._call(batch, self._masked(vector))[1])

    def _masked(self, vector: Vector) -> Vector:
        """Return a vector without what is along pruned weights."""
        return [part if mask is None else part * mask for part, mask in zip(vector, self._masks, strict=True)]

    def _call(self, batch: Any, along: Vector | None) -> tuple[Tensor, Vector]:
        placed = place(batch, self._device, self._dtype)
        return functional_call(self._differentiated, self._tensors, (placed, self.parameters, along))


def _grad(value: Tensor, parameters: Vector, *, create_graph: bool = False) -> Vector:
    """Differentiate a number by parameters. The derivative by a parameter that it does not depend on is 0."""
    return list(
        torch.autograd.grad(value, parameters, create_graph=create_graph, materialize_grads=True, allow_unused=True)
    )


def _single(tensor: Tensor) -> Tensor:
    """Return a tensor in single precision if its precision is lower, else as it is."""
    narrow = tensor.is_floating_point() and tensor.element_size() < 4
    return tensor.float() if narrow else tensor


@contextmanager
def _second_derivatives() -> Iterator[None]:
    """Restrict attention to the one implementation that can be differentiated twice.

    Raises:
        ConfigError: Another operation has no second derivative.
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
