"""Data parallelism: gradients averaged over ranks by DistributedDataParallel, and UpdateStats along with them."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from distgrow.core.errors import ConfigError
from distgrow.core.plan import Plan
from distgrow.distributed.world import World
from distgrow.engine.batches import Loss
from distgrow.engine.objective import WeightedLoss
from distgrow.engine.stats import SIZE, MakeStats, UpdateStats, check_agreed


class StatsChannel(nn.Module):
    """Carry UpdateStats in the gradients' own all-reduce: as the gradient of a parameter that is always zero."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.zeros = nn.Parameter(torch.zeros(SIZE, dtype=dtype, device=device))

    def attach(self, stats: Callable[[], UpdateStats]) -> Tensor:
        """Return a zero to be added to the loss; `stats` is called in its backward.

        Backward takes the last made of the nodes that are ready, so one that is made before a model's forward has its
        turn after the whole of it.
        """
        return _Attached.apply(self.zeros, lambda: self._vector(stats()))

    def _vector(self, stats: UpdateStats) -> Tensor:
        packed = stats.pack()
        plain = torch.tensor([0.0 if isinstance(value, Tensor) else value for value in packed], dtype=self.zeros.dtype)
        vector = plain.to(self.zeros.device, non_blocking=True)
        for place, value in enumerate(packed):
            if isinstance(value, Tensor):
                vector[place] = value  # in a list of numbers it would make the CPU wait for a GPU
        return vector

    def read(self, votes: int) -> UpdateStats:
        """Return the means over ranks, after the last backward; `votes` is how many were sent. Waits for a GPU."""
        return UpdateStats.unpack(self.sent().tolist(), votes)

    def sent(self) -> Tensor:
        """Return the packed means over ranks, after the last backward; the next update overwrites them."""
        assert self.zeros.grad is not None
        return self.zeros.grad

    def clear(self) -> None:
        """Drop the stats: the update is over."""
        self.zeros.grad = None


class _Attached(torch.autograd.Function):
    """Zero, whose gradient is made up when backward comes to it."""

    @staticmethod
    def forward(ctx: Any, zeros: Tensor, gradient: Callable[[], Tensor]) -> Tensor:
        ctx.gradient = gradient
        return zeros.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor, None]:
        return ctx.gradient(), None


class _Reduced(WeightedLoss):
    """WeightedLoss with a channel: what DDP averages the gradients of."""

    def __init__(self, model: nn.Module, loss: Loss, world: World) -> None:
        super().__init__(model, loss)
        dtype = torch.float64 if next(model.parameters()).dtype.to_real() == torch.float64 else torch.float32
        self.channel = StatsChannel(dtype, world.device)

    def forward(
        self, batch: Any, weight: float, stats: MakeStats | None = None, *, without_loss: bool = False
    ) -> Tensor:
        """See WeightedLoss; `stats` are sent along with the gradient."""
        if stats is None:
            return super().forward(batch, weight)
        losses: list[Tensor] = []
        attached = self.channel.attach(lambda: stats(losses[0]))
        loss = super().forward(batch, weight)
        losses.append(loss.detach())
        return loss + attached


class DataParallel:
    """Wrap model and loss in DDP, with its buckets settled.

    DDP regroups its buckets after the first backward, by the order in which gradients arrived. The order of a sum
    over three or more ranks depends on the grouping, so a resumed run would differ in the last bits from one that was
    never stopped. A first backward through zeros, before any data, fixes the grouping for both.
    """

    def __init__(self, model: nn.Module, loss: Loss, world: World, *, bucket_mb: float, find_unused: bool) -> None:
        self._module, self._world, self._find_unused = _Reduced(model, loss, world), world, find_unused
        self.ddp = DistributedDataParallel(
            self._module,
            device_ids=[world.device.index] if world.device.type == "cuda" else None,
            gradient_as_bucket_view=True,
            find_unused_parameters=find_unused,
            bucket_cap_mb=bucket_mb,  # pyright: ignore[reportArgumentType]
        )
        self._forwards = 0  # of the update under way
        self.ddp(None, 0.0, lambda _: UpdateStats()).backward()
        for parameter in self._module.parameters():
            parameter.grad = None

    def loss(self, batch: Any, weight: float, stats: MakeStats | None) -> Tensor:
        """Return a micro-batch's weighted loss; an update's last micro-batch has `stats`."""
        self._forwards += 1
        return self.ddp(batch, weight, stats)

    def read(self, plan: Plan, votes: int) -> UpdateStats:
        """Return the means over ranks of their stats, after the last backward. Waits for a GPU.

        Raises:
            TrainingFailed: Ranks are not at the same batch and learning rate.
            ConfigError: DDP has not averaged, as it waits for gradients that will not come.
        """
        return self.checked(plan, self._module.channel.read(votes))

    def sent(self) -> Tensor:
        """Return the packed means over ranks of their stats, on their device, to be read later."""
        return self._module.channel.sent()

    def checked(self, plan: Plan, stats: UpdateStats) -> UpdateStats:
        """Return the means over ranks of their stats after a check, unless a rank had no memory for its part.

        Raises:
            TrainingFailed: Ranks are not at the same batch and learning rate.
            ConfigError: DDP has not averaged, as it waits for gradients that will not come.
        """
        if stats.failed > 0:
            return stats
        if not self._find_unused and math.isclose(stats.batch * self._world.size, plan.told, rel_tol=1e-5):
            raise ConfigError(
                "the loss did not depend on all parameters in this update, and several ranks need every gradient: set "
                "requires_grad=False where it never does, engine.find_unused=true where it sometimes does not, or "
                "train in one process"
            )
        check_agreed(plan, stats, self._world)
        return stats

    def clear(self) -> None:
        """Drop the stats: the update is over."""
        self._module.channel.clear()
        self._forwards = 0

    def poison(self) -> None:
        """Reduce NaN and failed stats in place of the last micro-batch: no rank then applies the update."""
        if self._forwards:  # the first of an update broadcasts the buffers, once
            self.ddp.require_forward_param_sync = False
        self.ddp(None, math.nan, lambda _: UpdateStats(failed=1.0)).backward()

    def poison_rest(self) -> bool:
        """Do as `poison` after a last backward that failed halfway; return False if nothing was left to do.

        DDP refuses the parameters that had their turn.
        """
        channel, left = self._module.channel, False
        for parameter in filter(lambda p: p.requires_grad, self._module.parameters()):
            mine = parameter is channel.zeros
            rest = channel.attach(lambda: UpdateStats(failed=1.0)) if mine else (math.nan * parameter).abs().sum()
            try:
                rest.backward()
                left = True
            except RuntimeError as error:
                if "ready only once" not in str(error):
                    raise
        return left
