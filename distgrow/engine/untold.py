"""Untold: what an update gave until the next one has been begun, and its numbers on their way to the host.

It knows no engine.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distgrow.core.noise_stats import Measured
from distgrow.core.plan import Plan
from distgrow.core.progress import Lost, Outcome, Withdrawn
from distgrow.engine.delayed import plain_plan, plan_of
from distgrow.engine.state import read, written
from distgrow.engine.stats import UpdateStats

#: The file of a checkpoint with what an update gave that is not told yet.
FILE = "untold.pt"


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


class Telling:
    """Tell what each update gave once the next one has been begun."""

    def __init__(self) -> None:
        self._last: Untold | None = None

    def next(self, plan: Plan, made: Outcome | Later, votes: int) -> Outcome:
        """Keep what an update gave, and return what the one before it gave. Collective.

        Args:
            plan: The update's.
            made: What it gave, or what will know that.
            votes: How many were cast with it.
        """
        last, self._last = self._last, Untold(plan, made)
        return Outcome(told=False, votes=(False,) * votes) if last is None else last.told()

    def last(self) -> tuple[Plan, Outcome] | None:
        """See Engine."""
        last, self._last = self._last, None
        return None if last is None else (last.plan, last.told())

    def files(self) -> dict[str, bytes]:
        """Return the file of a checkpoint with what is not told yet; nothing if all is told. Collective."""
        return {} if self._last is None else {FILE: written(self._last.plain())}

    def load(self, folder: Path) -> None:
        """Take over what `files` returned, from the folder of a checkpoint."""
        file = folder / FILE
        self._last = Untold.of_plain(read(file, torch.device("cpu"))) if file.exists() else None


def packed(stats: UpdateStats, device: torch.device) -> Tensor:
    """Return packed stats as one tensor on the device. The host does not wait."""
    numbers = stats.pack()
    plain = torch.tensor([0.0 if isinstance(value, Tensor) else value for value in numbers], dtype=torch.float64)
    vector = plain.to(device, non_blocking=True)
    for place, value in enumerate(numbers):
        if isinstance(value, Tensor):
            vector[place] = value
    return vector
