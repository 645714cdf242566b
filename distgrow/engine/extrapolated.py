"""The torch engine with `extrapolate`: it evaluates the gradient of an update at a shifted point."""

import math
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distgrow.core.errors import ConfigError
from distgrow.core.extrapolate import Extrapolate
from distgrow.core.order import mix_int
from distgrow.core.plan import Plan
from distgrow.core.progress import Outcome
from distgrow.data.seeding import seed_generators
from distgrow.engine.batches import Loss, checked_loss
from distgrow.engine.clipping import gradients
from distgrow.engine.extrapolation import Extrapolation
from distgrow.engine.own_gradient import OwnGradient
from distgrow.engine.state import read, written
from distgrow.engine.stats import Applied, MakeStats, UpdateStats
from distgrow.engine.torch import TorchEngine

#: The past gradient's file in a checkpoint, and each rank's if it has its own.
FILE = "extrapolation.pt"
OWN_FILE = "extrapolation-{}.pt"


class ExtrapolatingEngine(TorchEngine):
    """Train with torch alone, by gradients at θ − ζ. Between updates the parameters are θ."""

    def __init__(self, model: nn.Module, loss: Loss, *, extrapolate: Extrapolate, **settings: Any) -> None:
        """Take over a model; `settings` are those of TorchEngine."""
        super().__init__(model, loss, **settings)
        self._extrapolate, self._extrapolated = extrapolate, 0  # rows of the present update evaluated for its shift
        self._shift = Extrapolation(extrapolate, self._optimizer_spec, self.optimizer, self._objective)
        self._past = extrapolate.kind == "past"
        own = self._past and extrapolate.local and self.world.size > 1  # one rank's own is that of the batch
        self._own = OwnGradient(self._shift.parameters, self._optimizer_spec.clip) if own else None

    def update(self, plan: Plan, micro_batches: Iterable[Any], votes: Sequence[bool] = ()) -> Outcome:
        """See Engine."""
        return replace(super().update(plan, micro_batches, votes), extrapolated=self._extrapolated)

    def accumulate(
        self, plan: Plan, micro_batches: Iterable[Any], votes: Sequence[bool] = (), *, rank: int | None = None
    ) -> UpdateStats:
        """See AccumulatingEngine; a fresh shift of the whole batch is a pass of its own over it."""
        rank, self._extrapolated = self.world.rank if rank is None else rank, 0
        if plan.probe:
            return super().accumulate(plan, micro_batches, votes, rank=rank)
        twice = self._extrapolate.kind == "fresh"
        if twice and not self._extrapolate.local:
            micro_batches = list(micro_batches)
            stats = super().accumulate(plan, micro_batches, votes, rank=rank)
            if not self._take(plan, stats):
                return stats
        elif twice:
            self.evaluations += sum(plan.sizes(rank))
        self._extrapolated = plan.batch if twice else 0
        with self._shift.held(plan, rank), nullcontext() if self._own is None else self._own.adding():
            return super().accumulate(plan, micro_batches, votes, rank=rank)

    def _take(self, plan: Plan, stats: UpdateStats) -> bool:
        """Keep the gradient at θ for the shift. Return False if it is not whole or not finite: `apply` drops it."""
        if self._parallel is None and (stats.failed or not stats.parts):
            return False
        self._check_use(stats)
        reduced, grad_norm = self._reduced(plan, stats)
        if reduced.failed:
            return False
        if not math.isfinite(grad_norm):  # clipping may have made zeros of it
            torch._foreach_mul_(gradients(self._parameters), math.nan)  # pyright: ignore[reportPrivateImportUsage]
            return False
        self._shift.take()
        self._forget()
        self._buffers.restore()  # only the pass that is applied moves BatchNorm's statistics
        seed_generators(mix_int(plan.seed, self.world.rank), self.world.device)  # and it draws the same dropout
        return True

    def _weighted(self, batch: Any, weight: float, stats: MakeStats | None) -> Tensor:
        self._shift.at_group(None if batch is None else lambda: self._mean_loss(batch))
        return super()._weighted(batch, weight, stats)

    def _mean_loss(self, batch: Any) -> Tensor:
        with self._autocast():
            return checked_loss(self._loss(self.model, self.place(batch)))

    def _apply(self, plan: Plan, stats: UpdateStats) -> Applied:
        applied = super()._apply(plan, stats)
        if applied.applied and self._past:
            self._shift.take(None if self._own is None else self._own.mean(stats.weight))
        return applied

    def all_seen(self) -> bool:
        """See AccumulatingEngine; not so if micro-batches differ by more than their samples' noise."""
        return self._extrapolate.shows_noise and super().all_seen()

    def reserve(self, plan: Plan) -> list[Tensor]:
        """See AccumulatingEngine; the shift takes memory, too."""
        copies = self._shift.missing + (self._own is not None)
        return [*super().reserve(plan), *(torch.empty_like(p) for p in self._parameters for _ in range(copies))]

    def snapshot(self) -> dict[str, bytes]:
        """See Engine; a past gradient is beside the rest, every rank's if it has its own."""
        files = super().snapshot()
        kept = self._past and (self.world.rank == 0 or self._own is not None)
        return {**files, self._file: written({"past": self._shift.state()})} if kept else files

    @property
    def _file(self) -> str:
        return OWN_FILE.format(self.world.rank) if self._extrapolate.local else FILE

    def load(self, folder: Path) -> None:
        """See Engine; ranks of another number than those that wrote their own past gradients begin without."""
        super().load(folder)
        if not self._past:
            return
        if self._extrapolate.local and len(list(folder.glob(OWN_FILE.format("*")))) not in (0, self.world.size):
            self._shift.forget()
            return
        try:
            self._shift.load(read(folder / self._file, self.world.device)["past"])
        except (OSError, ValueError) as error:
            raise ConfigError(f"{folder} has no past gradient of this model: {error}; begin a new run") from None
