"""The torch engine with `ahead`: the host begins an update before it knows what the last one gave."""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distgrow.core.errors import TrainingFailed
from distgrow.core.plan import Plan
from distgrow.core.progress import Outcome
from distgrow.engine.noise.hooks import summed
from distgrow.engine.stats import SIZE, WEIGHT, Applied, UpdateStats
from distgrow.engine.torch import TorchEngine
from distgrow.engine.untold import HostCopy, Later, Telling, packed


class AheadEngine(TorchEngine):
    """Train with torch alone. `update` begins an update and tells what the one before it gave.

    A step whose gradient was not finite is undone on the device. The host waits at the first update of every batch
    size alone, as memory may not hold its micro-batches.
    """

    ahead = 1

    def __init__(self, *parts: Any, **settings: Any) -> None:
        """Take the arguments of TorchEngine."""
        super().__init__(*parts, **settings)
        self._telling = Telling()
        self._shape: tuple[int, ...] | None = None  # of the last update, once one of its kind was applied

    def update(self, plan: Plan, micro_batches: Iterable[Any], votes: Sequence[bool] = ()) -> Outcome:
        """See Engine.

        Raises:
            TrainingFailed: One of several ranks ran out of memory in an update whose kind it had held before.
        """
        if plan.probe:
            return super().update(plan, micro_batches, votes)
        made = self._made(plan, micro_batches, votes)
        if isinstance(made, Outcome) and made.out_of_memory:
            return made
        return self._telling.next(plan, made, len(votes))

    def last(self) -> tuple[Plan, Outcome] | None:
        """See Engine."""
        return self._telling.last()

    def _made(self, plan: Plan, micro_batches: Iterable[Any], votes: Sequence[bool]) -> Outcome | Later:
        """Make an update, and return what it gave, or what will know that."""
        shape = (plan.batch, plan.micro, plan.accum)
        wait, self._shape = self._shape != shape, None
        self._begin(plan)
        stats = self.accumulate(plan, micro_batches, votes)
        try:
            made = self._stepped(plan, stats, wait=wait)
        finally:
            self._forget()
        self._shape = shape if not isinstance(made, Outcome) or not wait else None
        return made

    def _stepped(self, plan: Plan, stats: UpdateStats, *, wait: bool) -> Outcome | Later:
        if self._parallel is None and (stats.failed or not stats.parts):
            return self._skipped(plan, self._dropped(stats, math.nan, failed=stats.failed > 0))
        self._check_use(stats)
        sent = packed(stats, self.world.device) if self._parallel is None else self._parallel.sent().clone()
        return self._launched(plan, stats, sent, wait=wait)

    def _launched(self, plan: Plan, mine: UpdateStats, sent: Tensor, *, wait: bool) -> Outcome | Later:
        """Step with the mean gradient that the parameters have, unless it is not finite. Collective.

        Args:
            plan: The update's.
            mine: This rank's stats.
            sent: Packed means over ranks.
            wait: Whether the host looks before it steps.
        """
        norm = self._step.clipped_over_items(sent[WEIGHT], self._step.clipped_norm())
        if wait:
            found = self._unpacked(plan, sent.tolist(), len(mine.votes))
            if found.failed or not norm.isfinite():
                failed = self.world.sum([mine.failed])[0] > 0
                return self._skipped(plan, self._dropped(found, float(norm), failed=failed))
        bad = ~torch.isfinite(norm)
        terms = self._step.step_unless(bad, plan)
        self._buffers.restore(bad)
        if plan.average:
            self.average().update(plan.average, bad)
        copy = HostCopy([sent, norm, *(term for part in terms for term in part)])
        return Later(lambda: self._read(plan, copy.numbers(), terms, mine))

    def _skipped(self, plan: Plan, dropped: Applied) -> Outcome:
        self._step.reset(plan)  # the next update is planned as if this one had made it
        self._buffers.restore()
        return self._outcome(plan, dropped)

    def _read(self, plan: Plan, numbers: list[float], terms: list[list[Tensor]], mine: UpdateStats) -> Outcome:
        """Return what an update gave, from the numbers that the device has left. Collective.

        Args:
            plan: The update's.
            numbers: Packed means over ranks, the gradient's norm, inner products.
            terms: Those products as they were on the device.
            mine: This rank's stats.
        """
        stats, norm = self._unpacked(plan, numbers[:SIZE], len(mine.votes)), numbers[SIZE]
        finite = math.isfinite(norm)
        if stats.failed or (not finite and self.world.sum([mine.failed])[0]):
            raise TrainingFailed(
                f"a rank ran out of memory in an update of {plan.batch} samples, whose micro-batches of {plan.micro} "
                "rows memory had held before; engine.ahead=1 does not try again on several ranks: lower "
                "engine.max_micro, or set engine.ahead=0, and go on with --resume"
            )
        applied = Applied(stats, norm, finite, products=summed(numbers[SIZE + 1 :], terms))
        return self._outcome(plan, applied)

    def _unpacked(self, plan: Plan, numbers: Sequence[float], votes: int) -> UpdateStats:
        stats = UpdateStats.unpack(numbers, votes)
        return stats if self._parallel is None else self._parallel.checked(plan, stats)

    # ── checkpoints ─────────────────────────────────────────────────────────────────────────────────────────────

    def snapshot(self) -> dict[str, bytes]:
        """See Engine; what is not told yet is read for it, and told with the next update all the same."""
        untold = self._telling.files()
        files = super().snapshot()
        return {**files, **untold} if files else files

    def load(self, folder: Path) -> None:
        """See Engine."""
        super().load(folder)
        self._telling.load(folder)
        self._shape = None
