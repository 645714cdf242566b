"""The torch engine with `ahead`: the host begins an update before it knows what the last one gave."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distgrow.core.errors import TrainingFailed
from distgrow.core.noise_stats import Measured
from distgrow.core.plan import Plan
from distgrow.core.progress import Lost, Outcome, Withdrawn
from distgrow.engine.delayed import plain_plan, plan_of
from distgrow.engine.noise.hooks import summed
from distgrow.engine.state import read, written
from distgrow.engine.stats import SIZE, WEIGHT, Applied, UpdateStats
from distgrow.engine.torch import TorchEngine

#: The file of a checkpoint with what an update gave that is not told yet.
FILE = "untold.pt"


class AheadEngine(TorchEngine):
    """Train with torch alone. `update` begins an update and tells what the one before it gave.

    A step whose gradient was not finite is undone on the device. The host waits at the first update of every batch
    size alone, as memory may not hold its micro-batches.
    """

    ahead = 1

    def __init__(self, *parts: Any, **settings: Any) -> None:
        """Take the arguments of TorchEngine."""
        super().__init__(*parts, **settings)
        self._last: Untold | None = None
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
        last, self._last = self._last, Untold(plan, made)
        return Outcome(told=False, votes=(False,) * len(votes)) if last is None else last.told()

    def last(self) -> tuple[Plan, Outcome] | None:
        """See Engine."""
        last, self._last = self._last, None
        return None if last is None else (last.plan, last.told())

    def _made(self, plan: Plan, micro_batches: Iterable[Any], votes: Sequence[bool]) -> "Outcome | Later":
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

    def _stepped(self, plan: Plan, stats: UpdateStats, *, wait: bool) -> "Outcome | Later":
        if self._parallel is None and (stats.failed or not stats.parts):
            return self._skipped(plan, self._dropped(stats, math.nan, failed=stats.failed > 0))
        self._check_use(stats)
        sent = packed(stats, self.world.device) if self._parallel is None else self._parallel.sent().clone()
        return self._launched(plan, stats, sent, wait=wait)

    def _launched(self, plan: Plan, mine: UpdateStats, sent: Tensor, *, wait: bool) -> "Outcome | Later":
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
        untold = None if self._last is None else self._last.plain()
        files = super().snapshot()
        return {**files, FILE: written(untold)} if files and untold is not None else files

    def load(self, folder: Path) -> None:
        """See Engine."""
        super().load(folder)
        file = folder / FILE
        self._shape, self._last = None, None
        if file.exists():
            self._last = Untold.of_plain(read(file, torch.device("cpu")))


class HostCopy:
    """Hold numbers that a device is still computing, on their way to the host."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        """Begin to copy the elements of `tensors`, one after the other, once the device has them."""
        flat = torch.cat([tensor.detach().reshape(-1).double() for tensor in tensors])
        self._event: torch.cuda.Event | None = None
        if flat.is_cuda:
            self._host = torch.empty(flat.shape, dtype=flat.dtype, pin_memory=True)
            self._host.copy_(flat, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            self._host = flat

    def numbers(self) -> list[float]:
        """Return the numbers. Waits for the device to come to them, not for what it has to do after them."""
        if self._event is not None:
            self._event.synchronize()
        return self._host.tolist()


class Later:
    """Know, later, what an update gave."""

    def __init__(self, read: Callable[[], Outcome]) -> None:
        self._read, self._outcome = read, None

    def outcome(self) -> Outcome:
        """Return it. Waits for the device the first time; collective."""
        if self._outcome is None:
            self._outcome = self._read()
        return self._outcome


class Untold:
    """Hold an update, and what it gave, until that is told."""

    def __init__(self, plan: Plan, made: Outcome | Later) -> None:
        self.plan, self._made = plan, made

    def told(self) -> Outcome:
        """Return what it gave, as it is told with a later update. Collective."""
        outcome = self._found()
        if outcome.applied:
            return replace(outcome, of=self.plan)
        lost = Lost(batch=self.plan.batch, stage=self.plan.stage, finite=False, spared=self.plan.spared)
        return replace(outcome, of=self.plan, tokens=0, withdrawn=Withdrawn(lost=(lost,)))

    def _found(self) -> Outcome:
        return self._made if isinstance(self._made, Outcome) else self._made.outcome()

    def plain(self) -> dict[str, Any]:
        """Return it as plain values. Collective."""
        outcome = self._found()
        names = ("applied", "loss", "grad_norm", "empty", "tokens", "votes")
        values = {name: getattr(outcome, name) for name in names}
        return {"plan": plain_plan(self.plan), "measured": asdict(outcome.measured), "outcome": values}

    @classmethod
    def of_plain(cls, values: dict[str, Any]) -> "Untold":
        """Return it from plain values. The inverse of `plain`, but for the votes, which were of the processes then."""
        outcome = Outcome(**values["outcome"], measured=Measured(**values["measured"]))
        return cls(plan_of(values["plan"]), replace(outcome, votes=(False,) * len(outcome.votes)))


def packed(stats: UpdateStats, device: torch.device) -> Tensor:
    """Return packed stats as one tensor on the device. The host does not wait."""
    numbers = stats.pack()
    plain = torch.tensor([0.0 if isinstance(value, Tensor) else value for value in numbers], dtype=torch.float64)
    vector = plain.to(device, non_blocking=True)
    for place, value in enumerate(numbers):
        if isinstance(value, Tensor):
            vector[place] = value
    return vector
