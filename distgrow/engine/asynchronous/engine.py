"""AsyncEngine: applies the gradients of asynchronous workers in the order in which they come; knows no ray."""

import math
import weakref
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from distgrow.core.counted import counted
from distgrow.core.errors import TrainingFailed
from distgrow.core.plan import Plan
from distgrow.core.progress import Lost, Outcome, Withdrawn
from distgrow.distributed.world import World
from distgrow.engine.active import activate
from distgrow.engine.asynchronous.spec import Async
from distgrow.engine.asynchronous.workers import Came, Died, Job, Parts, Start, Workers
from distgrow.engine.batches import Loss, Metrics, check_memory, drawn_rows
from distgrow.engine.delayed import plain_plan, plan_of
from distgrow.engine.gradients import Gradient, Gradients
from distgrow.engine.items import Items, Weights
from distgrow.engine.objective import apart
from distgrow.engine.spec import Torch
from distgrow.engine.state import read, written
from distgrow.engine.torch import TorchEngine
from distgrow.optim import OptimizerSpec
from distgrow.optim.layout import as_laid_out

#: Workers that may die over one batch.
MOST_DEATHS = 3
#: The file of a checkpoint that holds gradients that are not applied yet.
FILE = "in_flight.pt"


class Taken(NamedTuple):
    """Hold what has become of a gradient that has come."""

    gradient: Gradient
    delay: int  #: updates between the parameters that it was computed at and those that it is applied to
    lost: Lost | None  #: set if it was not applied


class AsyncEngine(TorchEngine):
    """Hand out batches, and apply one gradient that has come for each, once no worker is idle.

    A batch is counted, and charged as applied, when it is handed out. One whose gradient is then not applied is
    withdrawn again.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        *,
        metrics: Metrics | None = None,
        spec: Async,
        optimizer: OptimizerSpec | None = None,
        world: World | None = None,
        items: Items | None = None,
        start: Start,
    ) -> None:
        """Take over a model; `start` starts the workers, which the first update does."""
        alone = Torch(max_micro=spec.max_micro, precision=spec.precision, device=spec.device)
        super().__init__(model, loss, metrics=metrics, spec=alone, optimizer=optimizer, world=world, items=items)
        self._async, self._start = spec, start
        self._started: Workers | None = None
        self._version, self._kept = 0, (-1, None)  # updates applied; the tensors that workers were last given
        self._out = 0  # jobs that workers have
        self._waiting = deque[Job]()  # those that no worker has, as theirs have died
        self._come = deque[Came]()  # gradients that have come and are not applied yet
        self._withdrawn, self._fault = Withdrawn(), None

    # ── an update ───────────────────────────────────────────────────────────────────────────────────────────────

    def update(self, plan: Plan, micro_batches: Iterable[Any], votes: Sequence[bool] = ()) -> Outcome:
        """See Engine. Loss and norm are those of the gradient that was taken, mostly another's than the plan's.

        Raises:
            TrainingFailed: A worker ran out of memory, or several died over one batch.
        """
        activate(self.model, plan.active)  # for evaluations here; workers do the same
        job = self._job(plan, micro_batches)
        self._waiting.append(job)
        self._hand_out()
        taken = self._take()
        withdrawn, tokens, cast = self.withdrawn(), job.tokens, tuple(map(bool, votes))
        if taken is None:
            return Outcome(tokens=tokens, votes=cast, withdrawn=withdrawn, fault=self._fault)
        return Outcome(
            applied=taken.lost is None,
            empty=taken.gradient.empty,
            loss=taken.gradient.loss,
            grad_norm=taken.gradient.grad_norm,
            tokens=tokens,
            votes=cast,
            delay=taken.delay,
            withdrawn=withdrawn,
            fault=self._fault,
        )

    def _job(self, plan: Plan, micro_batches: Iterable[Any]) -> Job:
        """Count a batch and keep it for workers."""
        batches, weights = list(micro_batches), Weights(plan, self._items, self.tokens)
        for batch, rows in drawn_rows(plan, 0, batches):
            weights.of(batch, rows)
            self.evaluations += rows  # workers' own counts are held against it
        tokens = int(weights.tokens) if math.isfinite(weights.tokens) else 0
        return Job(plan=plan, batches=self._workers().keep(batches), tokens=tokens)

    def _hand_out(self) -> None:
        """Hand out all that no worker has, each at the present parameters; wait until workers are idle for it."""
        while self._waiting:
            if self._workers().idle():
                job = self._waiting.popleft()
                job.version = self._version
                self._workers().hand_out(job, self._tensors())
                self._out += 1
            else:
                self._look(block=True)

    def _take(self) -> Taken | None:
        """Apply the gradient that came first, waiting for it unless a worker is idle. None: none has come."""
        while not self._come:
            self._hand_out()
            if not self._look(block=not self._workers().idle() and self._out > 0) and not self._come:
                return None
        return self._apply_late(self._come.popleft())

    def _look(self, *, block: bool) -> bool:
        """Take note of what has happened. Return whether anything has that matters here."""
        happened = self._workers().next(block=block)
        if happened is None:
            return block  # a worker has become idle
        if isinstance(happened, Came):
            self._out -= 1
            self._check(happened)
            self._come.append(happened)
        elif isinstance(happened, Died):
            self._out -= 1
            self._note_death(happened.job)
        else:
            self._compute_here(happened.why)
        return True

    def _check(self, came: Came) -> None:
        plan = came.job.plan
        if came.gradient.out_of_memory:
            raise TrainingFailed(
                f"a worker ran out of memory with micro-batches of {counted(plan.micro, 'row')}; lower "
                "engine.max_micro and go on with --resume"
            )
        if came.gradient.rows != plan.batch:
            raise RuntimeError(f"a worker evaluated {counted(came.gradient.rows, 'row')} of a batch of {plan.batch}")

    def _note_death(self, job: Job) -> None:
        """Charge what a worker has evaluated that died as `discarded`, and let another do its job."""
        job.deaths += 1
        if job.deaths > MOST_DEATHS:
            raise TrainingFailed(
                f"{job.deaths} workers of engine.kind=async died one after the other over the same batch of "
                f"{job.plan.batch} samples; see Ray's logs for why: often memory, for which engine.max_micro is lower"
            )
        self._withdrawn = replace(self._withdrawn, wasted=self._withdrawn.wasted + job.plan.batch)
        self._waiting.appendleft(job)

    def _compute_here(self, why: str) -> None:
        """Compute in this process what is left to do, as no worker is there, so that the run ends with a checkpoint."""
        self._fault = f"there has been no worker for {self._async.wait_s:g} s (engine.wait_s){why}"
        kept = [buffer.detach().clone() for buffer in self._objective.buffers()]
        here = self._parts()
        own = Gradients(
            here.model, here.loss, spec=here.spec, clip=here.clip, device=str(self.world.device), items=here.items
        )
        while self._waiting:
            job = self._waiting.popleft()
            job.version = self._version
            self._come.append(Came(job=job, gradient=own.compute(job.plan, self._workers().value(job.batches))))
            self._assign_buffers(kept)
        own.close()

    def _apply_late(self, came: Came) -> Taken:
        """Apply a gradient by its own plan, unless it is too old or not finite."""
        job, gradient, plan = came.job, came.gradient, came.job.plan
        delay = self._version - job.version
        factor = self._async.factor(delay) if gradient.finite else 0.0
        if factor == 0:
            lost = Lost(
                batch=plan.batch, stage=plan.stage, tokens=job.tokens, finite=gradient.finite, spared=plan.spared
            )
            self._withdrawn = replace(self._withdrawn, lost=(*self._withdrawn.lost, lost))
            return Taken(gradient, delay, lost)
        for parameter, value in zip(self._parameters, gradient.values, strict=True):
            parameter.grad = None if value is None else as_laid_out(value.to(parameter.device), parameter)
        try:
            self.step(plan if factor == 1 else replace(plan, lr=plan.lr * factor))
        except (RuntimeError, MemoryError) as error:
            check_memory(error, "the optimizer's state")
            raise
        self._assign_buffers(gradient.buffers)
        if plan.average:
            self.average().update(plan.average)
        self._forget()
        self._version += 1
        return Taken(gradient, delay, None)

    @torch.no_grad()
    def _assign_buffers(self, values: Sequence[Tensor]) -> None:
        for now, value in zip(self._objective.buffers(), values, strict=True):
            now.copy_(value)

    # ── workers ─────────────────────────────────────────────────────────────────────────────────────────────────

    def _workers(self) -> Workers:
        """Return the workers, which are started here if they were not."""
        if self._started is None:
            parts = self._parts()
            model, loss = apart(parts.model, parts.loss, self.world.device)
            self._started = self._start(replace(parts, model=model, loss=loss), self._async)
            self._end_workers = weakref.finalize(self, self._started.close)
        return self._started

    def _parts(self) -> Parts:
        clip = self._optimizer_spec.clip
        spec = self.spec.model_copy(update={"device": self._async.device})
        return Parts(model=self.model, loss=self._loss, items=self._items, clip=clip, spec=spec)

    def _tensors(self) -> Any:
        """Return parameters and buffers as they are now, kept for workers once a version."""
        version, kept = self._kept
        if version != self._version or kept is None:
            tensors = [*(parameter.detach() for parameter in self._parameters), *self._objective.buffers()]
            kept = self._workers().keep([tensor.cpu() for tensor in tensors])
            self._kept = self._version, kept
        return kept

    def _settle(self) -> None:
        """Wait for all gradients in flight."""
        while self._out or self._waiting:
            self._hand_out()
            if self._out:
                self._look(block=True)

    # ── beside updates ──────────────────────────────────────────────────────────────────────────────────────────

    def drain(self) -> bool:
        """See Engine."""
        self._settle()
        drained = len(self._come) > 0 or self._withdrawn != Withdrawn()
        while self._come:
            self._apply_late(self._come.popleft())
        return drained

    def withdrawn(self) -> Withdrawn | None:
        """See Engine."""
        withdrawn, self._withdrawn = self._withdrawn, Withdrawn()
        self.evaluations += withdrawn.wasted  # now that the ledger is told
        return withdrawn if withdrawn != Withdrawn() else None

    def snapshot(self) -> dict[str, bytes]:
        """See Engine; gradients in flight are waited for, and not applied."""
        self._settle()
        files = super().snapshot()
        if self._come or self._withdrawn != Withdrawn():
            come = [_plain(came, self._version) for came in self._come]
            files[FILE] = written({"come": come, "wasted": self._withdrawn.wasted})
        return files

    def load(self, folder: Path) -> None:
        """See Engine."""
        super().load(folder)
        self._come.clear()
        if (folder / FILE).exists():
            state = read(folder / FILE, torch.device("cpu"))
            self._come.extend(_came(values) for values in state["come"])
            self._withdrawn = Withdrawn(wasted=state["wasted"])

    def close(self) -> None:
        """See Engine."""
        if self._started is not None:
            self._end_workers()
        super().close()


def _plain(came: Came, version: int) -> dict[str, Any]:
    """Return a gradient that has come, with its plan, as tensors and plain values."""
    names = ("values", "buffers", "finite", "empty", "loss", "grad_norm", "rows")
    gradient = {name: getattr(came.gradient, name) for name in names}
    job = {"plan": plain_plan(came.job.plan), "tokens": came.job.tokens, "version": came.job.version - version}
    return {"job": job, "gradient": gradient}


def _came(values: dict[str, Any]) -> Came:
    """Return the gradient of plain values. The inverse of `_plain`, at version 0."""
    job = {**values["job"], "plan": plan_of(values["job"]["plan"]), "batches": None}
    return Came(job=Job(**job), gradient=Gradient(**values["gradient"], out_of_memory=False))
