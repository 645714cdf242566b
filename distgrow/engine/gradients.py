"""Gradients: what an asynchronous worker computes, a batch's mean gradient at given parameters; steps nothing."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from distgrow.core.plan import Plan
from distgrow.distributed.world import World
from distgrow.engine.batches import Loss
from distgrow.engine.items import Items
from distgrow.engine.spec import Torch
from distgrow.engine.torch import TorchEngine
from distgrow.engine.torch_step import TorchStep
from distgrow.optim.sgd import SGD


@dataclass(frozen=True, slots=True, kw_only=True)
class Gradient:
    """Hold a batch's mean gradient, clipped, and what else its computation has given."""

    values: list[Tensor | None]  #: in the parameters' order
    buffers: list[Tensor]  #: of model and loss, as the forward passes left them
    finite: bool  #: False: it is not to be applied
    empty: bool  #: the batch counted no items
    out_of_memory: bool
    loss: float
    grad_norm: float  #: before clipping
    rows: int  #: evaluated, counted from the data


class _NoStep(TorchStep):
    """Take the mean gradient, clipped, in place of a step with it."""

    taken: list[Tensor | None]

    def step(self, plan: Plan) -> None:
        """Take it; move nothing."""
        self.taken = [parameter.grad for parameter in self._parameters]


class Gradients(TorchEngine):
    """Compute gradients as the torch engine does in one process, and step no parameter."""

    _step: _NoStep

    def __init__(
        self, model: nn.Module, loss: Loss, *, spec: Torch, clip: float | None, device: str, items: Items | None
    ) -> None:
        """Take over a model.

        Args:
            model: The model.
            loss: Its loss.
            spec: How to compute.
            clip: Largest norm of a mean gradient; None: no clipping.
            device: Where to compute.
            items: What the loss is a mean over, if not rows.
        """
        world = World(device=torch.device(device))
        optimizer = SGD(clip=clip)
        super().__init__(model, loss, spec=spec, optimizer=optimizer, world=world, items=items)
        self._step = _NoStep(
            optimizer, self.optimizer, self._parameters,
            norms=self._norms, products=self._products, world=world, items=items is not None, delay=0,
        )  # fmt: skip

    @property
    def tensors(self) -> list[Tensor]:
        """Return parameters and buffers: what a gradient depends on."""
        return [*(parameter.detach() for parameter in self._parameters), *self._objective.buffers()]

    @torch.no_grad()
    def move_to(self, values: Sequence[Tensor]) -> None:
        """Give `tensors` other values."""
        for now, value in zip(self.tensors, values, strict=True):
            now.copy_(value)

    def compute(self, plan: Plan, micro_batches: Sequence[Any]) -> Gradient:
        """Return the mean gradient of a plan's batch at the present parameters, on the CPU."""
        before, self._step.taken = self.evaluations, []
        alone = replace(plan, window=0, product=False, preconditioned=False, average=0.0, optimizer=None)
        outcome = self.update(alone, micro_batches)
        return Gradient(
            values=[None if value is None else value.cpu() for value in self._step.taken],
            buffers=[buffer.detach().cpu().clone() for buffer in self._objective.buffers()],
            finite=outcome.applied,
            empty=outcome.empty,
            out_of_memory=outcome.out_of_memory,
            loss=outcome.loss,
            grad_norm=outcome.grad_norm,
            rows=self.evaluations - before,
        )
