"""Rebudget: lets a run go on with another budget, once what that changes in its plan is none or accepted."""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from distgrow.checkpoint.manager import stands_at
from distgrow.checkpoint.storage import Store
from distgrow.core.budget import Budget
from distgrow.core.counted import counted
from distgrow.core.errors import RunError
from distgrow.core.progress import Progress
from distgrow.growth.controller import Controller
from distgrow.growth.replan import cut_short, overspent, replanned
from distgrow.run.folder import RunFolder
from distgrow.tracking.events import Rebudget
from distgrow.tracking.jsonl import JSONL
from distgrow.tracking.read import read_events


@dataclass(frozen=True, slots=True)
class Budgeting:
    """Decide whether a run may go on with another budget, and record that it does. Rank 0 alone calls it."""

    folder: RunFolder
    store: Store
    budget: Budget  #: the present one
    plan: Callable[[Budget], Controller]  #: what decides under a budget
    accepted: bool  #: whether the plan may change: --rebudget

    def change(self, recorded: Mapping[str, Any]) -> None:
        """Log the change from the budget that config.yaml records.

        Raises:
            RunError: More is done than the budget allows, or the plan changes and nobody has accepted that.
        """
        old, at = Budget.model_validate(recorded), stands_at(self.store)
        before, after = self.plan(old), self.plan(self.budget)
        if overspent(self.budget, at, after.epoch):
            raise RunError(
                f"budget: {shown(self.budget)} is less than {self.folder.path} has done already ({_done(at)}); raise "
                f"it, or set it back to {shown(old)}"
            )
        changes = replanned(before, after, at)
        if changes and not self.accepted:
            raise RunError(
                f"budget: {shown(self.budget)} in place of {shown(old)} changes more than where the run ends, as its "
                "growth or learning rate is cut to the budget:\n  "
                + "\n  ".join(changes)
                + "\ngive --rebudget to go on from where it stands under the new plan, or set the budget back"
            )
        self._log(old, at, changes, voided=at.ended if _longer(before, after) else None)
        for line in changes:
            _tell(line)
        if cut_short(before, at):
            _tell(
                f"the last update was no whole batch, as the budget of {shown(old)} ended there: a run that had "
                f"{shown(self.budget)} from the start differs from it on"
            )

    def _log(self, old: Budget, at: Progress, changes: list[str], voided: str | None) -> None:
        times = [event.time_s for event in read_events(self.folder.metrics)]
        event = Rebudget(
            step=at.step, samples=at.samples, sfo=at.ledger.total, time_s=max(times, default=0.0), old=shown(old),
            new=shown(self.budget), changes=changes, voided=voided,
        )  # fmt: skip
        log = JSONL(self.folder.metrics)
        log.log(event.to_json())
        log.flush()
        log.close()


def shown(budget: Budget) -> str:
    """Return a budget as it is written: epochs=80."""
    given = budget.model_dump(exclude_none=True)
    return ", ".join(f"{unit}={amount:g}" if unit == "epochs" else f"{unit}={amount}" for unit, amount in given.items())


def _longer(before: Controller, after: Controller) -> bool:
    return after.samples() > before.samples()


def _done(at: Progress) -> str:
    done = {"update": at.step, "sample": at.ledger.applied, "gradient evaluation": at.ledger.first_time}
    return ", ".join(counted(number, noun) for noun, number in done.items())


def _tell(line: str) -> None:
    print(f"distgrow: {line}", file=sys.stderr, flush=True)
