"""The torch engine: one process, or DistributedDataParallel over many; decides nothing about batch or learning rate."""

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distgrow.core.errors import ConfigError
from distgrow.core.noise_stats import Measured
from distgrow.core.order import mix_int
from distgrow.core.plan import Plan
from distgrow.core.progress import Outcome
from distgrow.data.seeding import seed_generators
from distgrow.distributed.world import World
from distgrow.engine.batches import (
    Buffers,
    Loss,
    Metrics,
    checked_loss,
    drawn_rows,
    memory_for,
    place,
    ran_out_of_memory,
    serialised,
)
from distgrow.engine.ddp import Notes, Ranks
from distgrow.engine.functional import FunctionalObjective, hollow
from distgrow.engine.metrics import means
from distgrow.engine.noise_hooks import MicroBatchNorms, StepProducts
from distgrow.engine.spec import Torch
from distgrow.optim import OptimizerSpec
from distgrow.optim.sgd import SGD


class TorchEngine:
    """Exact mean gradients over a global batch, on whatever world and micro-batch the plan says."""

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        *,
        metrics: Metrics | None = None,
        spec: Torch | None = None,
        optimizer: OptimizerSpec | None = None,
        world: World | None = None,
    ) -> None:
        self.spec, self.world, settings = spec or Torch(), world or World(), optimizer or SGD()
        double = self.spec.precision == "float64"
        self.model = model.to(device=self.world.device, dtype=torch.float64 if double else None)
        if self.spec.compile:
            self.model.compile()
        self.model.train()
        self.evaluations = 0
        self._metrics = metrics or (lambda model, batch: {"loss": loss(model, batch)})
        self._parameters = list(self.model.parameters())
        self._optimizer = settings.build(self._parameters)
        self._clip, self._used = settings.clip, False
        self._state_copies = settings.state_copies
        self._loss, self._penalty, self._buffers = loss, settings.penalty, Buffers(self.model)
        self._norms, self._products = MicroBatchNorms(self._parameters, self.world.size), StepProducts(settings)
        self._products.watch(self._optimizer)
        self._ranks = Ranks(self.model, loss, self.world, self.spec.bucket_mb) if self.world.size > 1 else None

    def update(self, plan: Plan, micro_batches: Iterable[Any], votes: Sequence[bool] = ()) -> Outcome:
        """See Engine. Raises ValueError where a micro-batch does not have the rows that the plan gave it."""
        seed_generators(mix_int(plan.seed, self.world.rank), self.world.device)
        self._buffers.keep()
        self._norms.begin(plan)
        self._products.begin(plan)
        ballast = self._ballast(plan) if plan.probe else ()
        notes = self.accumulate(plan, micro_batches, votes)
        if notes is None:
            return self._dropped()
        grad_norm = self._clipped_norm().item()  # waits for a GPU
        if (told := self._told(notes.tolist(), plan, votes)) is None:
            return self._dropped(Outcome())
        loss, parts_sq, cast = told
        outcome = Outcome(loss=loss, grad_norm=grad_norm, votes=cast)
        del ballast
        if not math.isfinite(grad_norm):
            return self._dropped(outcome)
        with memory_for("the optimizer's state"):
            self.step(plan.lr)
        measured = self._measure(plan, grad_norm, parts_sq)
        self._forget()
        return outcome if measured is None else replace(outcome, measured=measured())

    def _told(
        self, notes: Sequence[float], plan: Plan, votes: Sequence[bool]
    ) -> tuple[float, float, tuple[bool, ...]] | None:
        """Mean loss, what Parts has seen on all ranks, and the votes cast; None where a rank's were lost."""
        if self._ranks is not None:
            return self._ranks.told(notes, plan, len(votes))
        return notes[0], float(share) if (share := self._norms.total()) is not None else math.nan, tuple(votes)

    def _measure(self, plan: Plan, grad_norm: float, parts_sq: float) -> Callable[[], Measured] | None:
        """After the step of an update: what it shows of noise, to be had later. Collective."""
        if not (plan.window or plan.product):
            return None
        penalty, product = self._products.results(grad_norm)
        batch_sq = grad_norm * grad_norm + penalty if plan.window else math.nan
        known = self.world.mean_async([penalty, batch_sq, product])

        def measured() -> Measured:
            penalty, batch_sq, product = known()
            return Measured(parts_sq=parts_sq + penalty, batch_sq=batch_sq, product=product)

        return measured

    def _dropped(self, outcome: Outcome | None = None) -> Outcome:
        """The outcome of an update that is not applied; None from the ranks that ran out of memory. Collective.

        Those have made everybody's gradient NaN, so all ranks come here, and only here they ask each other why.
        """
        self._forget()
        self._buffers.restore()
        if self.world.sum([outcome is None])[0] == 0:
            assert outcome is not None
            return replace(outcome, applied=False)
        if self.world.device.type == "cuda":
            torch.cuda.empty_cache()
        return Outcome(applied=False, out_of_memory=True)

    def accumulate(self, plan: Plan, micro_batches: Iterable[Any], votes: Sequence[bool] = ()) -> Tensor | None:
        """Add this rank's part to the gradients; gives the mean loss and, from several ranks, the votes cast.

        The last backward averages over ranks; the ones before it do not communicate. None where this rank ran out
        of memory: it has then taken its part in that average with NaN. Rows count as evaluated once they are begun.
        """
        losses: list[Tensor] = []
        short = False
        for k, (batch, rows) in enumerate(drawn_rows(plan, self.world.rank, micro_batches), start=1):
            last = k == plan.accum
            self.evaluations += rows
            if not short:
                weight, notes = plan.weight(rows), None
                if last and self._ranks is not None:
                    notes = partial(self._notes, plan, weight, losses, votes)
                loss = self._backward(batch, weight, notes, last=last)
                losses += [] if loss is None else [loss]
                short = loss is None
            elif last and self._ranks is not None:
                self._ranks.spoil()
        if short:
            return None
        if self._ranks is None:
            return sum(losses[1:], start=losses[0]).reshape(1)
        self._check_use()
        return self._ranks.notes()

    def _notes(
        self, plan: Plan, weight: float, before: list[Tensor], votes: Sequence[bool], loss: Tensor
    ) -> Sequence[Tensor | float]:
        """What this rank has to tell the others once the last backward has come to all parameters; see Ranks.told."""
        whole = self._norms.complete  # it is not where a forward's part on another device or thread comes later
        self._norms.end(weight)
        total = self._norms.total() if whole else None
        share = (math.nan if total is None else total) if plan.window else 0.0
        return [sum(before, start=loss), share, plan.batch, plan.lr, *votes]

    def _backward(self, batch: Any, weight: float, notes: Notes | None, *, last: bool) -> Tensor | None:
        """Forward and backward of one micro-batch: its weighted loss, or None where memory did not hold it."""
        loss = None
        try:
            with nullcontext() if self._ranks is None or last else self._ranks.ddp.no_sync():
                loss = self._weighted(batch, weight, notes)
                loss.backward()
                if notes is None:
                    self._norms.end(weight)
                return loss.detach()
        except (RuntimeError, MemoryError) as error:
            if not ran_out_of_memory(error):
                raise
        if not last or self._ranks is None:
            return None
        if loss is None:
            self._ranks.spoil()
        elif not self._ranks.spoil_rest():
            return loss.detach()  # every gradient had arrived before
        return None

    def _ballast(self, plan: Plan) -> list[Tensor]:
        """What the optimizer's state will take, where it is not there yet: a probe has to leave it room."""
        if self._optimizer.state:
            return []
        with memory_for("the optimizer's state"):
            copies = self._state_copies + self._products.copies(plan)
            return [torch.empty_like(p) for p in self._parameters for _ in range(copies)]

    def _check_use(self) -> None:
        """ConfigError where the first update left parameters without a gradient: DDP would wait for them for ever."""
        if self._used:
            return
        named = self.model.named_parameters()
        unused = [name for name, parameter in named if parameter.requires_grad and parameter.grad is None]
        if unused:
            shown = ", ".join(unused[:5]) + (" …" if len(unused) > 5 else "")
            raise ConfigError(
                f"the loss does not depend on {shown}, and several ranks need every gradient: "
                "set requires_grad=False there, or train in one process"
            )
        self._used = True

    def step(self, lr: float) -> None:
        """One optimizer step at learning rate `lr`, times a parameter group's own lr_scale."""
        for group in self._optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        self._optimizer.step()

    def evaluate(self, batches: Iterable[tuple[Any, int]]) -> dict[str, float]:
        """See Engine."""
        self.world.share(list(self.model.buffers()))
        was_training = self.model.training
        self.model.eval()
        with torch.inference_mode(), self._autocast():
            found = means(lambda batch: self._metrics(self.model, self._place(batch)), batches, self.world)
        self.model.train(was_training)
        return found

    def functional(self) -> FunctionalObjective:
        """See Engine."""
        return FunctionalObjective(
            hollow(self.model),
            self._loss,
            parameters=dict(self.model.named_parameters()),
            buffers=dict(self.model.named_buffers()),
            penalty=self._penalty,
            world=self.world,
        )

    def snapshot(self) -> dict[str, bytes]:
        """See Engine; the first rank holds all."""
        if self.world.rank > 0:
            return {}
        state = {"model": self.model.state_dict(), "optimizer": self._optimizer.state_dict()}
        return {"engine.pt": serialised(state)}

    def load(self, folder: Path) -> None:
        """See Engine."""
        state = torch.load(folder / "engine.pt", map_location=self.world.device, weights_only=True)
        try:
            self.model.load_state_dict(state["model"])
            self._optimizer.load_state_dict(state["optimizer"])
        except (RuntimeError, ValueError) as error:
            raise ConfigError(f"{folder} was written with another model: {error}; give the run back its own") from None

    def close(self) -> None:
        """See Engine."""
        self._norms.close()

    def _forget(self) -> None:
        """Drop the gradients; Optimizer.zero_grad does the same, many times slower."""
        for parameter in self._parameters:
            parameter.grad = None
        if self._ranks is not None:
            self._ranks.forget()

    def _weighted(self, batch: Any, weight: float, notes: Notes | None) -> Tensor:
        with self._autocast():
            batch = self._place(batch)
            if self._ranks is not None:
                return self._ranks.loss(batch, weight, notes)
            loss = checked_loss(self._loss(self.model, batch))
            return loss if weight == 1 else loss * weight

    def _autocast(self) -> torch.autocast | nullcontext[None]:
        if self.spec.precision != "bfloat16":
            return nullcontext()
        return torch.autocast(self.world.device.type, dtype=torch.bfloat16)

    def _place(self, batch: Any) -> Any:
        return place(batch, self.world.device, torch.float64 if self.spec.precision == "float64" else None)

    def _clipped_norm(self) -> Tensor:
        """The norm of the mean gradient, which is then clipped; a non-finite one is the same on every rank."""
        grads = [p.grad for p in self._parameters if p.grad is not None]
        # as nn.utils.get_total_norm, which sorts by device first and takes twice as long
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))  # pyright: ignore[reportPrivateImportUsage]
        if self._clip is not None:
            nn.utils.clip_grads_with_norm_(self._parameters, self._clip, norm)
        return norm
