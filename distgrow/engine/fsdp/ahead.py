"""The FSDP engine with `ahead`: the host begins an update before it knows what the last one gave."""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distgrow.core.plan import Plan
from distgrow.core.progress import Outcome
from distgrow.engine.clipping import clip_on_device, root_of
from distgrow.engine.fsdp.engine import FSDPEngine
from distgrow.engine.noise.hooks import NO_SUMS, Sums
from distgrow.engine.skipping import looks_itself, step_unless
from distgrow.engine.stats import SIZE, WEIGHT, Applied, UpdateStats, check_agreed
from distgrow.engine.untold import HostCopy, Later, Telling, packed
from distgrow.optim.base import fused


class AheadFSDPEngine(FSDPEngine):
    """Train in shards. `update` begins an update and tells what the one before it gave.

    A step whose gradient was not finite is undone on the device. The host waits until a first step is made, which
    makes the optimizer's state. It need not look for a lack of memory, which ends the run on the rank that meets it.
    """

    ahead = 1

    def __init__(self, *parts: Any, **settings: Any) -> None:
        """Take the arguments of FSDPEngine. Collective: every rank must call."""
        super().__init__(*parts, **settings)
        self._telling, self._begun = Telling(), False
        fuse(self.optimizer)

    def update(self, plan: Plan, micro_batches: Iterable[Any], votes: Sequence[bool] = ()) -> Outcome:
        """See Engine."""
        if plan.probe:
            return super().update(plan, micro_batches, votes)
        self._begin(plan)
        stats = self.accumulate(plan, micro_batches, votes)
        try:
            with torch.no_grad(), self._no_way_back(plan.micro):
                made = self._launched(plan, stats)
        finally:
            self._shards.forget()
        return self._telling.next(plan, made, len(votes))

    def last(self) -> tuple[Plan, Outcome] | None:
        """See Engine."""
        return self._telling.last()

    def _launched(self, plan: Plan, mine: UpdateStats) -> Outcome | Later:
        """Reduce, clip and step, unless the gradient is not finite. Collective.

        Args:
            plan: The update's.
            mine: This rank's stats.
        """
        sent = self._sent(mine)
        norm = self._clipped(sent[WEIGHT], sent[SIZE].sqrt())
        if not self._begun:
            found, known = self._unpacked(plan, sent.tolist(), len(mine.votes))
            if self._used is not None:
                self._used.agree()
            if not math.isfinite(known):
                return self._skipped(plan, found, known)
            self._begun = True
        bad = ~torch.isfinite(norm)
        self._reset(plan)  # not undone, as the next update is planned as if this one had been made
        terms = step_unless(bad, self.optimizer, self._products, lambda: self._step(plan))
        self._buffers.restore(bad)
        if plan.average:
            self.average().update(plan.average, bad)
        copy = HostCopy([sent, *self._sums(terms)])
        return Later(lambda: self._read(plan, copy.numbers(), mine, tested=len(terms[2]) > 0))

    def _sent(self, mine: UpdateStats) -> Tensor:
        """Return the packed means over ranks of their stats, then the gradient's squared norm. Collective."""
        sent = torch.cat([packed(mine, self.world.device) / self.world.size, self._square().reshape(1)])
        self.world.add([sent])
        return sent

    def _clipped(self, weight: Tensor, norm: Tensor) -> Tensor:
        """Divide the gradient by the items' `weight`, if there are any, clip it, and return its norm between."""
        clip = self._optimizer_spec.clip
        if self._items is None and clip is None:
            return norm
        weight = torch.ones_like(norm) if self._items is None else weight
        return clip_on_device(list(self._shards.local.values()), clip, weight, norm)

    def _sums(self, terms: list[list[Tensor]]) -> Tensor:
        """Return each kind of inner products, added up over parameters and ranks; none if none is wanted. Collective.

        Ranks add them up here, and not as they are told: no host waits for another then.
        """
        if not self._products.wanted:
            return torch.empty(0)
        none = torch.zeros((), dtype=torch.float64, device=self.world.device)
        sums = torch.stack([torch.stack(part).double().sum() if part else none for part in terms])
        self.world.add([sums])
        return sums

    def _skipped(self, plan: Plan, found: UpdateStats, norm: float) -> Outcome:
        self._reset(plan)
        self._buffers.restore()
        return self._outcome(plan, Applied(stats=found, grad_norm=norm, applied=False))

    def _read(self, plan: Plan, numbers: list[float], mine: UpdateStats, *, tested: bool) -> Outcome:
        """Return what an update gave, from the numbers that the device has left.

        Args:
            plan: The update's.
            numbers: Packed means over ranks, the gradient's squared norm, sums of inner products.
            mine: This rank's stats.
            tested: Whether there was a step before.
        """
        stats, norm = self._unpacked(plan, numbers, len(mine.votes))
        sums = Sums(*numbers[SIZE + 1 :], tested=tested) if numbers[SIZE + 1 :] else NO_SUMS
        return self._outcome(plan, Applied(stats, norm, math.isfinite(norm), products=sums))

    def _unpacked(self, plan: Plan, numbers: Sequence[float], votes: int) -> tuple[UpdateStats, float]:
        """Return the means over ranks of their stats, and the gradient's norm, before clipping."""
        stats, norm = UpdateStats.unpack(numbers[:SIZE], votes), root_of(numbers[SIZE])
        check_agreed(plan, stats, self.world)
        if self._items is not None:
            norm = norm / stats.weight if stats.weight else math.nan
        return stats, norm

    # ── checkpoints ─────────────────────────────────────────────────────────────────────────────────────────────

    def snapshot(self) -> dict[str, bytes]:
        """See Engine; what is not told yet is read for it, and told with the next update all the same."""
        untold = self._telling.files()
        return {**super().snapshot(), **(untold if self.world.rank == 0 else {})}

    def load(self, folder: Path) -> None:
        """See Engine."""
        super().load(folder)
        fuse(self.optimizer)  # groups of a run that waited may say otherwise
        self._telling.load(folder)
        self._begun = False


def fuse(optimizer: torch.optim.Optimizer) -> None:
    """Have fused kernels step what they can, if the optimizer was built of parameters on the meta device.

    torch refuses them there. The others of AdamW count steps on the host, which would wait to know of a skipped one.
    """
    for one in getattr(optimizer, "optimizers", [optimizer]):
        if isinstance(one, torch.optim.SGD | torch.optim.AdamW) and not looks_itself(one) and fused(one.param_groups):
            one._step_supports_amp_scaling = True  # pyright: ignore[reportAttributeAccessIssue]
            for group in one.param_groups:
                group["fused"] = True
