"""The torch engine with `delay: 1` and `ahead: 1`: a gradient is averaged over ranks while the next one is computed."""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distgrow.core.errors import ConfigError
from distgrow.core.plan import Plan
from distgrow.core.progress import Outcome
from distgrow.engine.ahead import AheadEngine
from distgrow.engine.batches import Loss
from distgrow.engine.delayed import plain_plan, plan_of
from distgrow.engine.state import read, written
from distgrow.engine.stats import ADDED, MAX_VOTES, SIZE, UpdateStats, check_agreed
from distgrow.engine.untold import Untold, packed
from distgrow.engine.used_parameters import check_gradients
from distgrow.optim.layout import as_laid_out

#: The file of a checkpoint with the gradient in flight.
FILE = "overlapped.pt"


class Sent:
    """Hold a gradient, and the statistics of its update, on their way over the ranks."""

    def __init__(self, plan: Plan, flat: Tensor, mine: UpdateStats, missing: set[int], ranks: int) -> None:
        """Begin to add up over `ranks` ranks. Collective: every rank must call.

        Args:
            plan: The update's.
            flat: This rank's gradients one after the other, then its packed stats.
            mine: These stats.
            missing: Numbers of parameters that have no gradient.
            ranks: 1: nothing is sent, and `flat` is the mean.
        """
        self.plan, self.mine, self.missing, self._flat, self._ranks = plan, mine, missing, flat, ranks
        self._work: Any = dist.all_reduce(flat, async_op=True) if ranks > 1 else None

    def mean(self) -> Tensor:
        """Return the mean over ranks: gradients, then packed stats. Waits for it."""
        if self._work is not None:
            self._work.wait()
            self._flat.div_(self._ranks)
            self._work = None
        return self._flat


class OverlappedEngine(AheadEngine):
    """Train with torch alone. A gradient is applied at the end of the next update, and what it gave is told then."""

    def __init__(self, *parts: Any, **settings: Any) -> None:
        """Take the arguments of TorchEngine. Collective: every rank must call."""
        super().__init__(*parts, **settings)
        kinds = {(p.dtype, p.device) for p in self._parameters}
        if len(kinds) > 1 or self._parameters[0].dtype not in (torch.float32, torch.float64):
            raise ConfigError(
                "engine.ahead=1 with engine.delay=1 sends one vector, which parameters of several precisions or "
                "devices, complex ones, or ones in half precision, do not make: set engine.ahead=0"
            )
        self._sent: Sent | None = None
        self._begun = self._moved = False  # whether a step has been made; whether `last` has made one
        self.world.share([*(p.detach() for p in self._parameters), *self._objective.buffers()])

    def _data_parallel(self, model: nn.Module, loss: Loss) -> None:
        """Wrap nothing: this engine averages gradients itself."""

    # ── an update ───────────────────────────────────────────────────────────────────────────────────────────────

    def update(self, plan: Plan, micro_batches: Iterable[Any], votes: Sequence[bool] = ()) -> Outcome:
        """See Engine."""
        if plan.probe:
            return super().update(plan, micro_batches, votes)
        shape = (plan.batch, plan.micro, plan.accum)
        self.world.share(list(self._objective.buffers()))
        self._begin(plan)
        stats = self.accumulate(plan, micro_batches, votes)
        alone = self.world.size == 1
        if (alone or shape != self._shape) and self.world.sum([stats.failed])[0]:
            self._buffers.restore()
            self._forget()
            return self._outcome(plan, self._dropped(stats, math.nan, failed=True))
        self._shape, earlier = shape, self._sent
        self._sent = self._send(plan, stats)
        return Outcome(told=False, votes=(False,) * len(votes)) if earlier is None else self._arrived(earlier).told()

    def last(self) -> tuple[Plan, Outcome] | None:
        """See Engine; its gradient is applied."""
        sent, self._sent = self._sent, None
        if sent is None:
            return None
        self._moved = True
        return sent.plan, self._arrived(sent).told()

    def drain(self) -> bool:
        """See Engine; `last` has applied what was in flight."""
        moved, self._moved = self._moved, False
        return moved

    def _send(self, plan: Plan, stats: UpdateStats) -> Sent:
        """Send this rank's part of the gradient, and its stats along with it. Collective."""
        self._check_all(stats)
        vector = packed(stats, self.world.device)
        self._buffers.restore(~torch.isfinite(vector[0]))
        given = [torch.zeros_like(p) if p.grad is None else p.grad for p in self._parameters]
        alone = self.world.size == 1
        missing = {k for k, p in enumerate(self._parameters) if p.grad is None and (alone or not p.requires_grad)}
        missing = set[int]() if len(missing) == len(given) else missing  # no items: a gradient of 0/0, not of nothing
        flat = torch.cat([*(gradient.flatten() for gradient in given), vector.to(given[0].dtype)])
        if stats.failed:
            flat[:-SIZE] = math.nan
        self._forget()
        return Sent(plan, flat, stats, missing, self.world.size)

    def _check_all(self, stats: UpdateStats) -> None:
        """Check that every parameter has a gradient, which the mean over several ranks needs.

        Raises:
            ConfigError: One has none.
        """
        if stats.failed or not stats.parts:
            return
        self._check_use(stats)
        if self.world.size > 1:
            check_gradients(self._objective, every=True)

    def _arrived(self, sent: Sent) -> Untold:
        """Step with a gradient that has arrived, and return what it gave."""
        flat, start = sent.mean(), 0
        for number, parameter in enumerate(self._parameters):
            given = flat[start : start + parameter.numel()].view(parameter.shape)
            parameter.grad = None if number in sent.missing else as_laid_out(given, parameter)
            start += parameter.numel()
        try:
            made = self._launched(sent.plan, sent.mine, flat[start:], wait=not self._begun)
            self._begun = self._begun or not isinstance(made, Outcome)
            return Untold(sent.plan, made)
        finally:
            self._forget()

    def _unpacked(self, plan: Plan, numbers: Sequence[float], votes: int) -> UpdateStats:
        stats = UpdateStats.unpack(numbers, votes)
        if not stats.failed:
            check_agreed(plan, stats, self.world)
        return stats

    # ── checkpoints ─────────────────────────────────────────────────────────────────────────────────────────────

    def snapshot(self) -> dict[str, bytes]:
        """See Engine; the gradient in flight is waited for, and not applied."""
        files, sent = super().snapshot(), self._sent
        if sent is None:
            return files
        state = {"plan": plain_plan(sent.plan), "flat": sent.mean(), "votes": len(sent.mine.votes)}
        state |= {"missing": sorted(sent.missing), "ranks": self.world.size}
        return {**files, FILE: written(state)} if files else files

    def load(self, folder: Path) -> None:
        """See Engine."""
        super().load(folder)
        self._sent, self._begun = None, False
        if not (folder / FILE).exists():
            return
        state = read(folder / FILE, self.world.device)
        flat, mine = state["flat"], UpdateStats(votes=(0.0,) * state["votes"])
        if flat.numel() != sum(parameter.numel() for parameter in self._parameters) + SIZE:
            raise ConfigError(f"{folder} holds a gradient in flight of another model; give the run back its own")
        flat[-MAX_VOTES:] = 0  # they were of the processes then
        flat[-SIZE:][ADDED] *= state["ranks"] / self.world.size
        self._sent = Sent(plan_of(state["plan"]), flat, mine, set(state["missing"]), ranks=1)
