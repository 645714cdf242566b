"""Ranks: gradients averaged over ranks by DistributedDataParallel, and what ranks tell each other along with them."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from distgrow.core.errors import ConfigError, TrainingFailed
from distgrow.core.plan import Plan
from distgrow.distributed.world import World
from distgrow.engine.batches import Loss, WeightedLoss

#: From the weighted loss of the last micro-batch what a rank has to tell, in the order of Ranks.told.
Notes = Callable[[Tensor], Sequence[Tensor | float]]

#: Votes that an update can carry.
BALLOT = 4
#: A learning rate that nothing moves by, in float32.
_NOTHING = 1e-30


class Ranks:
    """DDP around model and loss, with its buckets settled.

    DDP regroups its buckets after the first backward, by the order in which gradients arrived. The order of a sum
    over three or more ranks depends on the grouping, so a resumed run would differ in the last bits from one that was
    never stopped. A first backward through zeros, before any data, fixes the grouping for both.
    """

    def __init__(self, model: nn.Module, loss: Loss, world: World, bucket_mb: float) -> None:
        self._shared, self._world = _Shared(model, loss, world), world
        self.ddp = DistributedDataParallel(
            self._shared,
            device_ids=[world.device.index] if world.device.type == "cuda" else None,
            gradient_as_bucket_view=True,
            bucket_cap_mb=bucket_mb,  # pyright: ignore[reportArgumentType]
        )
        self._forwards = 0  # of the update under way
        self.ddp(None, 0.0).backward()
        for parameter in self._shared.parameters():
            parameter.grad = None

    def loss(self, batch: Any, weight: float, notes: Notes | None = None) -> Tensor:
        """The weighted loss; of an update's last micro-batch it carries notes, which are asked for with it.

        That is when the backward has come to everything else: mean loss, a term of a sum over ranks, batch, η, votes.
        """
        self._forwards += 1
        return self.ddp(batch, weight, notes)

    def notes(self) -> Tensor:
        """What the ranks have told each other, after the last backward; for `told`."""
        assert self._shared.tally.grad is not None
        return self._shared.tally.grad

    def told(self, notes: Sequence[float], plan: Plan, votes: int) -> tuple[float, float, tuple[bool, ...]] | None:
        """Mean loss, sum of the shares and which of so many votes anyone has cast, from the notes as numbers.

        None where a rank has spoilt them: it ran out of memory after all its gradients had been sent. TrainingFailed
        where ranks are not at the same batch and learning rate, see check_agreed, and ConfigError where DDP has not
        averaged, as it waits for gradients that will not come.
        """
        loss, share, batch, lr, *ballot = notes
        if math.isnan(batch):
            return None
        if math.isclose(batch * self._world.size, plan.batch, rel_tol=1e-5):
            raise ConfigError(
                "the loss did not depend on all parameters in this update, and several ranks need every gradient: set "
                "requires_grad=False where it never does, add 0 times a parameter's sum where it sometimes does not, "
                "or train in one process"
            )
        check_agreed(plan, batch, lr, self._world)
        return loss, share * self._world.size, tuple(count > 0 for count in ballot[:votes])

    def forget(self) -> None:
        """Drop the notes: the update is over."""
        self._shared.tally.grad, self._forwards = None, 0

    def spoil(self) -> None:
        """Take this rank's part in the average with NaN, instead of the last micro-batch: no rank then applies it."""
        if self._forwards:  # the first of an update shares the buffers, once
            self.ddp.require_forward_param_sync = False
        self.ddp(None, math.nan).backward()

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


def check_agreed(plan: Plan, batch: float, lr: float, world: World) -> None:
    """TrainingFailed where the means over ranks of the batch and the learning rate are not this rank's own.

    Gradients were weighted wrongly then, and from here on samples would be repeated or lost. Of many ranks those that
    agree may not see it, by what float32 does to a sum of so many; the odd one does, and the others miss it then.
    """
    rounding = (3 + world.size) * 2**-22
    if abs(batch - plan.batch) > rounding * plan.batch or abs(lr - plan.lr) > rounding * plan.lr + _NOTHING:
        raise TrainingFailed(
            f"rank {world.rank} is at batch {plan.batch} and lr {plan.lr:g}, where the mean over ranks is {batch:g} "
            f"and {lr:g}: they have not decided alike; go on with --resume"
        )


class _Shared(WeightedLoss):
    """Model and loss as the one module that DDP wraps.

    What ranks must also know of each other travels in the gradients' own all-reduce: it is the gradient of `tally`, a
    parameter that is always zero and that nobody else sees.
    """

    def __init__(self, model: nn.Module, loss: Loss, world: World) -> None:
        super().__init__(model, loss)
        dtype = torch.float64 if next(model.parameters()).dtype == torch.float64 else torch.float32
        self.tally = nn.Parameter(torch.zeros(4 + BALLOT, dtype=dtype, device=world.device))

    def forward(self, batch: Any, weight: float, notes: Notes | None = None) -> Tensor:
        """See WeightedLoss; `notes` make up the gradient of `tally`."""
        if notes is None:
            return super().forward(batch, weight)
        losses: list[Tensor] = []

        def gradient() -> Tensor:
            found = torch.zeros_like(self.tally)
            for place, value in enumerate(notes(losses[0])):
                found[place] = value  # one by one: a list would make the CPU wait for a GPU
            return found

        noted = _Noted.apply(self.tally, gradient)
        loss = super().forward(batch, weight)
        losses.append(loss.detach())
        return loss + noted


class _Noted(torch.autograd.Function):
    """Zero, whose gradient is made up when the backward comes to it.

    Backward takes the last made of the nodes that are ready, so one that was made before a model's forward has its
    turn after the whole of it.
    """

    @staticmethod
    def forward(ctx: Any, tally: Tensor, gradient: Callable[[], Tensor]) -> Tensor:
        ctx.gradient = gradient
        return tally.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor, None]:
        return ctx.gradient(), None
