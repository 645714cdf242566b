"""GrowthSession: the progress of a run under another trainer, its next update and its count; knows no trainer."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypedDict, Unpack

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
from distgrow.data.stream import open_stream
from distgrow.distributed.world import World
from distgrow.engine.batches import Buffers, checked_loss, drawn_rows
from distgrow.growth.controller import Controller
from distgrow.integrations.record import recorder
from distgrow.integrations.session_checks import check_names, check_rows, count_items, on_world

#: Updates in a row whose gradient is not finite, after which the run ends, as `run.max_skips` of fit().
MAX_SKIPS = 20


class Positions(dict[str, Tensor]):
    """The positions of a rank's rows for one update, which a trainer's loop is given in place of a batch."""


class Rows(TypedDict, total=False):
    """How a training set's rows are loaded, collated and counted: keywords of every way in, here in one place."""

    collate: Callable[[list[Any]], Any] | None
    """Makes a batch of rows. By default that is torch's."""
    items: Callable[[Any], int] | None
    """Counts what a micro-batch's loss is a mean over. By default that is its rows."""
    loading: Loading | None
    """How rows are loaded. By default this process loads them."""
    record: str | Path | None
    """Folder for config.yaml and metrics.jsonl, which `distgrow report` reads. By default nothing is written."""


class GrowthSession:
    """One run under another trainer, which calls `begin` before an update and `end` after it.

    A trainer's loop is given only the positions of this rank's rows as a batch. The rows are drawn when the update is
    made, so a loop may ask for its batches ahead of time.
    """

    def __init__(
        self, controller: Controller, dataset: Any, *, world: World | None = None, **rows: Unpack[Rows]
    ) -> None:
        """Check that the run can be made.

        Args:
            controller: Decides batches and learning rates.
            dataset: The training set, with rows by number.
            world: The ranks. By default that is this process alone.
            **rows: How its rows are loaded, collated and counted: see Rows.

        Raises:
            ConfigError: The data set has no rows by number, or the controller does not fit it or the ranks.
        """
        check_names(rows, Rows)
        self.world, self.progress = world or World(), Progress()
        self.controller = on_world(controller, self.world)
        check_rows_by_number(dataset, "the training set")
        check_rows(dataset, controller)
        self.controller.check()
        self._positions = open_stream(
            dataset, seed=controller.seed, collate=rows.get("collate"), sampling=controller.sampling
        )
        self._loading, self._items = rows.get("loading") or Loading(), rows.get("items")
        self._loader: Loader | None = None
        self._record = recorder(rows.get("record"), self.controller, self.world)
        self._buffers: Buffers | None = None

    @property
    def counts_items(self) -> bool:
        """Return whether losses are means over items that the user counts."""
        return self._items is not None

    @property
    def done(self) -> bool:
        """Return whether the budget is used up."""
        return self.controller.done(self.progress)

    @property
    def epoch(self) -> float:
        """Return the number of passes over the data so far."""
        return self.progress.samples / self.controller.epoch

    def shown(self, plan: Plan) -> dict[str, float]:
        """Return what a trainer shows of an update that is made, beside its own figures."""
        progress = self.progress
        return {"batch": plan.batch, "stage": plan.stage, "samples": progress.samples, "sfo": progress.ledger.total}

    def remaining(self) -> int:
        """Return the number of updates to come if none is skipped."""
        return sum(updates for _, updates in self._outline())

    def last_epoch(self) -> int:
        """Return the number of passes over the data at the end of the budget, begun ones included."""
        samples = self.progress.samples + sum(batch * updates for batch, updates in self._outline())
        return math.ceil(samples / self.controller.epoch)

    def _outline(self) -> list[tuple[int, int]]:
        """Return the stages to come as (batch, updates)."""
        if self.done:
            return []
        return [(batch, updates) for _, batch, updates in self.controller.outline(self.progress)]

    def __iter__(self) -> Iterator[Positions]:
        """Yield the positions of this rank's rows for each update that begins in the present pass over the data.

        They are those of a run that skips no update. Only their number is ever used.
        """
        progress, epoch = self.progress, self.controller.epoch
        number = progress.samples // epoch
        while progress.samples // epoch == number and not self.controller.done(progress):
            progress = self.controller.advance(progress)
            plan = self.controller.plan(progress)
            parts = plan.rows(progress.samples, self.world.rank)
            yield Positions(positions=torch.arange(parts[0].start, parts[-1].stop))
            progress = self.controller.after(progress, plan, Outcome())

    def begin(self, model: nn.Module) -> Plan:
        """Return the next update, and seed its random numbers."""
        self.progress = self.controller.advance(self.progress)
        plan = self.controller.plan(self.progress)
        self._buffers = self._buffers or Buffers(model)
        self._buffers.keep()
        self._record.begin(self.progress, plan)
        seed_generators(mix_int(plan.seed, self.world.rank), self.world.device)
        return plan

    def draw(self, plan: Plan) -> Iterator[tuple[Any, float, bool]]:
        """Yield this rank's micro-batches of the update: (collated rows, weight of their mean loss, whether the last).

        The weighted losses, summed over micro-batches and averaged over ranks, are the mean over the batch. Collective
        if items are counted: every rank must call.
        """
        if self._loader is None:
            self._loader = build_loader(self._positions, self.controller, self.world, self._loading)
        drawn = drawn_rows(plan, self.world.rank, self._loader.draw(self.progress, plan))
        if self._items is None:
            for k, (batch, rows) in enumerate(drawn, start=1):
                yield batch, plan.weight(rows), k == plan.accum
        else:
            yield from self._weighted_by_items([batch for batch, _ in drawn], self._items, plan)

    def _weighted_by_items(
        self, batches: list[Any], items: Callable[[Any], int], plan: Plan
    ) -> Iterator[tuple[Any, float, bool]]:
        """Yield micro-batches weighted by what they count; one that counts nothing has no mean loss and is left out."""
        counted = [(batch, count) for batch in batches if (count := count_items(items, batch))]
        total = self._sum(sum(count for _, count in counted))
        if not counted:  # a rank must take part in the backward pass that averages over ranks
            counted = [(self._first_with_items(items, plan), 0)]
        for k, (batch, count) in enumerate(counted, start=1):
            yield batch, count * self.world.size / max(1, total), k == len(counted)

    def _first_with_items(self, items: Callable[[Any], int], plan: Plan) -> Any:
        """Return a row that counts something, from those after the update.

        Raises:
            ConfigError: There is none in a whole pass over the data.
        """
        start = self.progress.samples + plan.batch
        for position in range(start, start + self.controller.epoch):
            batch = self._positions.__getitems__(range(position, position + 1))
            if count_items(items, batch):
                return batch
        raise ConfigError("items gave 0 for every row of the training set: there is nothing to train on")

    def _sum(self, count: int) -> int:
        """Add up over all ranks, on the device that the trainer's process group is for."""
        if self.world.size == 1:
            return count
        total = torch.tensor(count, device=self.world.device)
        dist.all_reduce(total)
        return int(total)

    def end(self, plan: Plan, parameters: Iterable[nn.Parameter], loss: Tensor | None = None) -> bool:
        """Count the update, and return whether it is to be applied.

        Args:
            plan: The update.
            parameters: They hold the gradients, averaged over ranks. Gradients that are not finite are dropped, on
                every rank alike, so that the trainer's step moves nothing.
            loss: This rank's part of the loss, of which the mean over ranks is the update's.

        Raises:
            Diverged: Too many updates in a row were not finite.
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
        outcome = Outcome(applied=applied, grad_norm=norm, loss=self._mean_loss(loss))
        self.progress = self.controller.after(self.progress, plan, outcome)
        self._record.end(self.progress, plan, outcome)
        if self.progress.skips >= MAX_SKIPS:
            raise Diverged(f"{MAX_SKIPS} updates in a row were not finite; lower lr.base or clip gradients")
        return applied

    def _mean_loss(self, loss: Tensor | None) -> float:
        """Return the mean over ranks if a record wants it."""
        if loss is None or not self._record.wanted:
            return math.nan
        if self.world.size > 1:
            dist.all_reduce(loss := loss.detach().clone())
        return float(loss) / self.world.size

    def evaluated(self, metrics: Mapping[str, Any]) -> None:
        """Record the metrics of an evaluation that the trainer has made."""
        self._record.evaluated(self.progress, metrics)

    def close(self) -> None:
        """End the processes that load rows, and the record. The next update starts others."""
        self._loader = None
        self._record.close(self.progress, done=self.done)

    def state_dict(self) -> dict[str, Any]:
        """Return plain numbers, for the trainer's checkpoint."""
        return self.progress.to_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.progress, self._buffers = Progress.from_dict(state), None


def weighted(loss: Any, weight: float) -> Tensor:
    """Return a micro-batch's part of the update's loss.

    Raises:
        ConfigError: The loss is no number with a gradient.
    """
    return checked_loss(loss) * weight
