"""FunctionalObjective: a model's objective at one moment, with derivatives; nothing done with it moves training.

It works on a copy of the model without tensors, which are lent to it at each call: no module that trains changes its
mode, no hook of DDP or DeepSpeed fires, no `.grad` is written.
"""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from distgrow.core.errors import ConfigError
from distgrow.distributed.world import World
from distgrow.engine.batches import Loss, WeightedLoss, place

Vector = list[Tensor]

_NO_SECOND = ("is not implemented", "double backward", "differentiate twice")


def hollow(model: nn.Module) -> nn.Module | ConfigError:
    """A copy of a model in eval mode, its parameters and buffers without content; what it ties stays tied.

    The reason why there is none where the model cannot be copied: whoever needs it may raise it.
    """
    empty: dict[int, Any] = {}
    for parameter in model.parameters():
        meta = torch.empty_like(parameter, device="meta")
        empty[id(parameter)] = nn.Parameter(meta, requires_grad=parameter.requires_grad)
    for buffer in model.buffers():
        empty[id(buffer)] = torch.empty_like(buffer, device="meta")
    try:
        return copy.deepcopy(model, empty).eval()
    except Exception as error:
        return ConfigError(
            f"the model cannot be copied, which exact probes need: {error}; take out of it what cannot be, or leave "
            "run.probe and growth by exact norms out"
        )


class FunctionalObjective:
    """f(θ) = mean loss + (λ/2)|θ|² at one θ, in eval mode and at least single precision, batch by batch."""

    def __init__(
        self,
        model: nn.Module | ConfigError,
        loss: Loss,
        *,
        parameters: Mapping[str, Tensor],
        buffers: Mapping[str, Tensor],
        penalty: float,
        world: World,
    ) -> None:
        """`model` is hollow; parameters and buffers are those of the model that it is a copy of, by their names.

        Buffers are the first rank's. ConfigError where there was no copy. Collective: every rank must call.
        """
        if isinstance(model, ConfigError):
            raise model
        self._objective, self._penalty, self._device = WeightedLoss(model, loss), penalty, world.device
        trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        lent = {name: _single(tensor.detach()).requires_grad_(name in trainable) for name, tensor in parameters.items()}
        copied = {name: _single(tensor.detach()).clone() for name, tensor in buffers.items()}
        world.share(list(copied.values()))
        self._tensors = {f"model.{name}": tensor for name, tensor in {**lent, **copied}.items()}
        self.parameters: Vector = [lent[name] for name in lent if name in trainable]  #: θ
        self._dtype = torch.float64 if self.parameters[0].dtype == torch.float64 else None

    def loss(self, batch: Any) -> Tensor:
        """The batch's mean loss, without the penalty."""
        return functional_call(self._objective, self._tensors, (place(batch, self._device, self._dtype), 1.0))

    def gradient(self, batch: Any) -> tuple[Tensor, Vector]:
        """The batch's mean loss, and its gradient by θ, the penalty's λθ included."""
        loss = self.loss(batch)
        return loss.detach(), [g.detach() for g in self._differentiated(loss, twice=False)]

    def product(self, batch: Any, vector: Vector) -> Vector:
        """The Hessian of the batch's mean loss by θ, the penalty's λ included, times `vector`.

        ConfigError where the model has no second derivatives.
        """
        with _second_derivatives():
            gradient = self._differentiated(self.loss(batch), twice=True)
            along = torch.stack([(g * v).sum() for g, v in zip(gradient, vector, strict=True)]).sum()
            if not along.requires_grad:  # linear in all of θ
                return [torch.zeros_like(v) for v in vector]
            return list(torch.autograd.grad(along, self.parameters, materialize_grads=True, allow_unused=True))

    def _differentiated(self, loss: Tensor, *, twice: bool) -> Vector:
        if self._penalty:
            squares = torch.stack([parameter.square().sum() for parameter in self.parameters])
            loss = loss + self._penalty / 2 * squares.sum()
        return list(
            torch.autograd.grad(loss, self.parameters, create_graph=twice, materialize_grads=True, allow_unused=True)
        )


def _single(tensor: Tensor) -> Tensor:
    """In single precision where it has less."""
    narrow = tensor.is_floating_point() and tensor.element_size() < 4
    return tensor.float() if narrow else tensor


@contextmanager
def _second_derivatives() -> Iterator[None]:
    """Attention takes the one path that can be differentiated twice; ConfigError where something else cannot."""
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    except RuntimeError as error:
        if not any(words in str(error) for words in _NO_SECOND):
            raise
        raise ConfigError(
            f"run.probe.curvature=true needs second derivatives, which the model lacks: {error}; set it to false"
        ) from error
