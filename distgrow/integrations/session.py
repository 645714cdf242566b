"""GrowthSession: where a run under another trainer is, what comes next and what has been done; knows no trainer."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distgrow.core.errors import ConfigError, Diverged
from distgrow.core.order import mix_int
from distgrow.core.plan import Plan
from distgrow.core.progress import Outcome, Progress
from distgrow.data.dataset import check_rows_by_number
from distgrow.data.loader import Loader, build_loader
from distgrow.data.seeding import seed_generators
from distgrow.data.spec import Loading
from distgrow.data.stream import SampleStream
from distgrow.distributed.world import World
from distgrow.engine.batches import Buffers, checked_loss, drawn_rows
from distgrow.growth.controller import Controller

#: Updates in a row whose gradient is not finite, after which the run ends, as `run.max_skips` of fit().
MAX_SKIPS = 20


class GrowthSession:
    """One run under another trainer, which asks it before and tells it after each update.

    What a trainer's loop is given as a batch is only the positions of this rank's rows: the rows themselves are drawn
    when the update is made, so a loop that asks for its batches ahead of time cannot be wrong about them.
    `items(batch)` counts what a micro-batch's loss is a mean over; by default its rows.
    """

    def __init__(
        self,
        controller: Controller,
        dataset: Any,
        *,
        collate: Callable[[list[Any]], Any] | None = None,
        items: Callable[[Any], int] | None = None,
        world: World | None = None,
        loading: Loading | None = None,
    ) -> None:
        self.world, self.progress = world or World(), Progress()
        self.controller = on_world(controller, self.world)
        check_rows_by_number(dataset, "the training set")
        check_length(dataset, controller)
        self.controller.check()
        self._positions = SampleStream(dataset, seed=controller.seed, collate=collate)
        self._loading, self._items = loading or Loading(), items
        self._loader: Loader | None = None
        self._buffers: Buffers | None = None

    @property
    def done(self) -> bool:
        """Whether the budget is spent."""
        return self.controller.done(self.progress)

    @property
    def epoch(self) -> float:
        """Passes over the data that are behind."""
        return self.progress.samples / self.controller.epoch

    def remaining(self) -> int:
        """Updates to come, if none is skipped."""
        return 0 if self.done else sum(updates for _, _, updates in self.controller.outline(self.progress))

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """The positions of this rank's rows for each update that begins in the pass over the data that is under way.

        They are as they will be if no update is skipped; nothing but their number is ever used.
        """
        progress, epoch = self.progress, self.controller.epoch
        number = progress.samples // epoch
        while progress.samples // epoch == number and not self.controller.done(progress):
            progress = self.controller.advance(progress)
            plan = self.controller.plan(progress)
            parts = plan.rows(progress.samples, self.world.rank)
            yield {"positions": torch.arange(parts[0].start, parts[-1].stop)}
            progress = progress.after(plan, Outcome())

    def begin(self, model: nn.Module) -> Plan:
        """The next update; its random numbers are seeded."""
        self.progress = self.controller.advance(self.progress)
        plan = self.controller.plan(self.progress)
        self._buffers = self._buffers or Buffers(model)
        self._buffers.keep()
        seed_generators(mix_int(plan.seed, self.world.rank), self.world.device)
        return plan

    def draw(self, plan: Plan) -> Iterator[tuple[Any, float, bool]]:
        """This rank's micro-batches of the update: (collated rows, weight of their mean loss, whether it is the last).

        Weighted, summed over micro-batches and averaged over ranks, it is the mean over the batch. Collective where
        `items` are counted.
        """
        if self._loader is None:
            self._loader = build_loader(self._positions, self.controller, self.world, self._loading)
        drawn = drawn_rows(plan, self.world.rank, self._loader.draw(self.progress, plan))
        if self._items is None:
            for k, (batch, rows) in enumerate(drawn, start=1):
                yield batch, plan.weight(rows), k == plan.accum
            return
        batches = [batch for batch, _ in drawn]
        counts = [counted(self._items, batch) for batch in batches]
        total = self._sum(sum(counts))
        for k, (batch, count) in enumerate(zip(batches, counts, strict=True), start=1):
            yield batch, count * self.world.size / total, k == plan.accum

    def _sum(self, count: int) -> int:
        """Over all ranks, on the device that the trainer's process group is for."""
        if self.world.size == 1:
            return count
        total = torch.tensor(count, device=self.world.device)
        dist.all_reduce(total)
        return int(total)

    def end(self, plan: Plan, parameters: Iterable[nn.Parameter]) -> bool:
        """Count the update whose gradients, averaged over ranks, are in `parameters`; whether it is to be applied.

        Gradients that are not finite are dropped, on every rank alike, so that the trainer's step moves nothing.
        Raises Diverged where too many in a row were not.
        """
        parameters = [parameter for parameter in parameters if parameter.grad is not None]
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        norm = float(nn.utils.get_total_norm(gradients))
        applied = math.isfinite(norm)
        if not applied:
            for parameter in parameters:
                parameter.grad = None
            assert self._buffers is not None
            self._buffers.restore()
        self.progress = self.progress.after(plan, Outcome(applied=applied, grad_norm=norm))
        if self.progress.skips >= MAX_SKIPS:
            raise Diverged(f"{MAX_SKIPS} updates in a row were not finite; lower lr.base or clip gradients")
        return applied

    def close(self) -> None:
        """End the processes that load rows; the next update starts others."""
        self._loader = None

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, for the trainer's checkpoint."""
        return self.progress.to_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of state_dict."""
        self.progress, self._buffers = Progress.from_dict(state), None


def weighted(loss: Any, weight: float) -> Tensor:
    """A micro-batch's part of the update's loss; ConfigError where the loss is no number with a gradient."""
    return checked_loss(loss) * weight


def counted(items: Callable[[Any], int], batch: Any) -> int:
    """What a micro-batch's loss is a mean over; ConfigError where that is nothing."""
    count = int(items(batch))
    if count < 1:
        raise ConfigError(f"items gave {count} for a micro-batch: its mean loss is none; leave such rows out")
    return count


def on_world(controller: Controller, world: World) -> Controller:
    """The controller on the trainer's ranks; ConfigError where it is meant for others, or measures."""
    growth = controller.growth
    if growth.adaptive:
        raise ConfigError(
            f"growth.kind={growth.name} goes by what distgrow's engines measure of each update, which other trainers "
            "do not show; choose a growth that follows a schedule, or train with distgrow.fit"
        )
    if controller.group is not None:
        raise ConfigError("the controller's group changes the number of ranks, which other trainers cannot; leave it")
    if controller.world not in (1, world.size):
        raise ConfigError(
            f"the controller is for world={controller.world}, but the trainer has {world.size} ranks; leave world out"
        )
    return replace(controller, world=world.size)


def check_length(dataset: Any, controller: Controller) -> None:
    """ConfigError where the schedule is for another number of samples."""
    if len(dataset) != controller.epoch:
        raise ConfigError(
            f"the training set has {len(dataset)} samples, but the controller was made for epoch={controller.epoch}; "
            f"give it epoch={len(dataset)}"
        )


def check_rate(groups: Sequence[dict[str, Any]], base: float) -> None:
    """ConfigError where the optimizer of a new run has a learning rate that is neither the controller's nor 0."""
    rates = {float(group["lr"]) for group in groups if "lr_scale" not in group}
    if rates - {0.0, base}:
        raise ConfigError(
            f"the optimizer has lr={max(rates):g}, but the controller's lr.base is {base:g}, which would replace it; "
            "give it lr=0.0, or the same"
        )


def check_groups(groups: Sequence[dict[str, Any]]) -> None:
    """ConfigError where parameter groups have learning rates of their own, which the plan's would replace."""
    rates = {float(group["lr"]) for group in groups if "lr_scale" not in group}
    if len(rates) > 1:
        raise ConfigError(
            f"the optimizer's parameter groups have the learning rates {sorted(rates)}, but the plan gives one; "
            'say how they differ by a factor in the group, "lr_scale": 0.1'
        )
