"""Ranks: gradients averaged over ranks by DistributedDataParallel, and what ranks tell each other along with them."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from distgrow.engine.batches import Loss, WeightedLoss
from distgrow.world import World

#: Votes that an update can carry.
BALLOT = 4


class Ranks:
    """DDP around model and loss, with its buckets settled.

    DDP regroups its buckets after the first backward, by the order in which gradients arrived. The order of a sum
    over three or more ranks depends on the grouping, so a resumed run would differ in the last bits from one that was
    never stopped. A first backward through zeros, before any data, fixes the grouping for both.
    """

    def __init__(self, model: nn.Module, loss: Loss, world: World, bucket_mb: float) -> None:
        self._shared = _Shared(model, loss, world)
        self.ddp = DistributedDataParallel(
            self._shared,
            device_ids=[world.device.index] if world.device.type == "cuda" else None,
            gradient_as_bucket_view=True,
            bucket_cap_mb=bucket_mb,  # pyright: ignore[reportArgumentType]
        )
        self._forwards = 0  # of the update under way
        self.ddp(None, 0.0, ()).backward()
        for parameter in self._shared.parameters():
            parameter.grad = None

    def loss(self, batch: Any, weight: float, votes: Sequence[bool]) -> Tensor:
        """The weighted loss, which carries the votes."""
        self._forwards += 1
        return self.ddp(batch, weight, votes)

    def notes(self) -> Tensor:
        """The mean loss over ranks and how many of them cast each vote, after the last backward; all divided alike."""
        assert self._shared.tally.grad is not None
        return self._shared.tally.grad

    def forget(self) -> None:
        """Drop the notes: the update is over."""
        self._shared.tally.grad, self._forwards = None, 0

    def spoil(self) -> None:
        """Take this rank's part in the average with NaN, instead of the last micro-batch: no rank then applies it."""
        if self._forwards:  # the first of an update shares the buffers, once
            self.ddp.require_forward_param_sync = False
        self.ddp(None, math.nan, ()).backward()

    def spoil_rest(self) -> bool:
        """The same where the last backward has failed halfway; False where nothing was left to do.

        DDP refuses the parameters that had their turn.
        """
        spoilt = False
        for parameter in filter(lambda p: p.requires_grad, self._shared.parameters()):
            try:
                (math.nan * parameter.sum()).backward()
                spoilt = True
            except RuntimeError as error:
                if "ready only once" not in str(error):
                    raise
        return spoilt


class _Shared(WeightedLoss):
    """Model and loss as the one module that DDP wraps.

    What ranks must also know of each other, the mean loss and their votes, travels in the gradients' own
    all-reduce: they are the gradient of `tally`, a parameter that is always zero and that nobody else sees.
    """

    def __init__(self, model: nn.Module, loss: Loss, world: World) -> None:
        super().__init__(model, loss)
        dtype = torch.float64 if next(model.parameters()).dtype == torch.float64 else torch.float32
        self.tally = nn.Parameter(torch.zeros(1 + BALLOT, dtype=dtype, device=world.device))

    def forward(self, batch: Any, weight: float, votes: Sequence[bool] = ()) -> Tensor:
        """See WeightedLoss."""
        loss = super().forward(batch, weight)
        return loss if batch is None else loss + (self.tally * self._notes(loss, votes)).sum()

    def _notes(self, loss: Tensor, votes: Sequence[bool]) -> Tensor:
        ballot = self.tally.new_tensor([*votes, *[False] * (BALLOT - len(votes))])
        return torch.cat([loss.detach().to(ballot.dtype)[None], ballot])
