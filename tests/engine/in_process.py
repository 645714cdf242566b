"""Asynchronous workers without Ray: they compute in this process, and come and die as a script says."""

import copy
from collections import deque
from collections.abc import Callable
from typing import Any

from distgrow.engine.asynchronous.spec import Async
from distgrow.engine.asynchronous.workers import Came, Died, Gone, Job, Parts, Start
from distgrow.engine.gradients import Gradient, Gradients

#: Of the numbers of the jobs that workers have, the oldest first: which one comes next.
Script = Callable[[list[int]], "int | Death"]


class Death(int):
    """The number of a job whose worker dies next."""


class InProcess:
    """Workers of one process."""

    def __init__(self, parts: Parts, spec: Async, script: Script, lifetimes: int | None = None) -> None:
        model, loss = copy.deepcopy((parts.model, parts.loss))
        self._gradients = Gradients(
            model, loss, spec=parts.spec, clip=parts.clip, device="cpu", items=parts.items
        )  # fmt: skip
        self._script, self._most, self._lifetimes = script, spec.workers, lifetimes
        self._jobs: deque[tuple[int, Job, Gradient]] = deque()
        self._handed = 0
        self.closed = False

    def keep(self, value: Any) -> Any:
        return copy.deepcopy(value)

    def value(self, kept: Any) -> Any:
        return kept

    @property
    def gone(self) -> bool:
        return self._lifetimes is not None and self._handed >= self._lifetimes

    def idle(self) -> bool:
        return len(self._jobs) < self._most and not self.gone

    def hand_out(self, job: Job, tensors: Any) -> None:
        assert self.idle()
        self._gradients.move_to(tensors)
        self._jobs.append((self._handed, job, self._gradients.compute(job.plan, job.batches)))
        self._handed += 1

    def next(self, *, block: bool) -> Came | Died | Gone | None:
        if not block:
            return None
        if self.gone:
            return Died(job=self._jobs.popleft()[1]) if self._jobs else Gone()
        assert self._jobs, "it waits for nothing"
        chosen = self._script([number for number, _, _ in self._jobs])
        at = next(k for k, (number, _, _) in enumerate(self._jobs) if number == chosen)
        _, job, gradient = self._jobs[at]
        del self._jobs[at]
        return Died(job=job) if isinstance(chosen, Death) else Came(job=job, gradient=gradient)

    def close(self) -> None:
        self.closed = True


def in_turn(jobs: list[int]) -> int:
    """The first is the first to come."""
    return jobs[0]


def hold_back(*slow: int, until: int) -> Script:
    """Jobs by their numbers come only if there is no other, or once job `until` has been handed out."""

    def script(jobs: list[int]) -> int:
        quick = [job for job in jobs if job not in slow]
        return jobs[0] if not quick or jobs[-1] >= until else quick[0]

    return script


def dying(*deaths: int) -> Script:
    """In turn, but for jobs by their numbers, over which the worker dies."""
    return lambda jobs: Death(jobs[0]) if jobs[0] in deaths else jobs[0]


class Scripted(Async):
    """The engine with such workers."""

    def start(self) -> Start:
        script, lifetimes = SCRIPT
        return lambda parts, spec: InProcess(parts, spec, script, lifetimes)


#: What the workers of the next engine do.
SCRIPT: list[Any] = [in_turn, None]


def scripted(script: Script = in_turn, lifetimes: int | None = None, **settings: Any) -> Scripted:
    """An engine whose workers follow a script. After so many `lifetimes` jobs all of them are gone."""
    SCRIPT[:] = [script, lifetimes]
    return Scripted(precision="float64", **settings)
