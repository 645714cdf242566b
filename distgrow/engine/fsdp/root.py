"""Root: the one module that all passes of a sharded model go through; and its products of steps and gradients."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

from distgrow.engine.batches import Loss
from distgrow.engine.noise.hooks import StepProducts, Sums
from distgrow.engine.objective import WeightedLoss
from distgrow.optim import OptimizerSpec


class Root(WeightedLoss):
    """WeightedLoss that all forwards go through, calls of the model by others too: fully_shard has one root."""

    def __init__(self, model: nn.Module, loss: Loss) -> None:
        super().__init__(model, loss)
        self._inside = False
        self.left: Callable[[], None] = lambda: None  #: called after a call of the model from elsewhere

    def forward(self, batch: Any, weight: float, *, without_loss: bool = False, call: Any = None) -> Any:
        """See WeightedLoss; `call` is called in place of the loss."""
        self._inside = True
        try:
            return super().forward(batch, weight, without_loss=without_loss) if call is None else call()
        finally:
            self._inside = False

    def let_in(self) -> None:
        """Let a call of the model that does not come through here do so. Such calls are collective."""
        forward = self.model.forward

        @wraps(forward)
        def through_root(*args: Any, **kwargs: Any) -> Any:
            if self._inside:
                return forward(*args, **kwargs)
            try:
                return self(None, 0.0, call=lambda: forward(*args, **kwargs))
            finally:
                if not torch.is_grad_enabled():
                    self.left()

        self.model.forward = through_root


class ShardProducts(StepProducts):
    """StepProducts of shards that several ranks hold."""

    def __init__(self, spec: OptimizerSpec, replicas: int) -> None:
        super().__init__(spec)
        self._replicas = replicas

    def results(self, sums: Sums, grad_norm: float) -> tuple[float, float]:
        """See StepProducts; a rank counts for its share of those that hold the same."""
        penalty, product = super().results(sums, grad_norm)
        return penalty / self._replicas, product / self._replicas


def single(leaf: Any) -> Any:
    """Return a leaf of what a model returns in single precision."""
    return leaf.float() if isinstance(leaf, Tensor) and leaf.dtype == torch.bfloat16 else leaf
