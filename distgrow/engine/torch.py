"""The torch engine: one process, or DistributedDataParallel over many; decides nothing about batch or learning rate."""

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distgrow.core.errors import ConfigError
from distgrow.core.plan import Plan
from distgrow.distributed.world import World
from distgrow.engine.batches import Loss, Metrics, check_memory, checked_loss, memory_for, place, ran_out_of_memory
from distgrow.engine.clipping import clip_factor, clip_over_items, norm_of
from distgrow.engine.ddp import DataParallel
from distgrow.engine.delayed import Delayed
from distgrow.engine.functional import FunctionalObjective
from distgrow.engine.items import Items
from distgrow.engine.metric import Roots, StepMetric
from distgrow.engine.objective import compile_in_place, empty_copy, to_precision
from distgrow.engine.part_norms import tell_parts
from distgrow.engine.spec import Torch
from distgrow.engine.state import load_module, read, written
from distgrow.engine.stats import MakeStats, UpdateStats
from distgrow.engine.update import AccumulatingEngine, Applied
from distgrow.engine.used_parameters import check_gradients
from distgrow.optim import OptimizerSpec
from distgrow.optim.at_growth import assign, reset_moments
from distgrow.optim.composite import has_modes
from distgrow.optim.sgd import SGD


class TorchEngine(AccumulatingEngine):
    """Train with torch alone."""

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        *,
        metrics: Metrics | None = None,
        spec: Torch | None = None,
        optimizer: OptimizerSpec | None = None,
        world: World | None = None,
        items: Items | None = None,
    ) -> None:
        self.spec, world, optimizer = spec or Torch(), world or World(), optimizer or SGD()
        self._dtype = torch.float64 if self.spec.precision == "float64" else None
        for module in (model, loss):
            if isinstance(module, nn.Module):
                to_precision(module, world.device, self._dtype)
                module.train()
        if self.spec.compile:
            compile_in_place(model)
        super().__init__(model, loss, metrics=metrics, optimizer=optimizer, world=world, items=items)
        self.optimizer, self._clip = optimizer.ready(self._objective.named(), model), optimizer.clip
        self._by_parts, self._modes = optimizer.goes_by_parts, has_modes(self.optimizer)
        self._set_mode("train")
        self._metric = StepMetric(optimizer, self.optimizer, self._parameters)
        self._state_copies, self._used, self.delay = optimizer.state_copies, False, self.spec.delay
        self._delayed = Delayed(self._parameters, self.delay, copies=world.size > 1)  # DDP's buckets are used again
        settings = {"bucket_mb": self.spec.bucket_mb, "find_unused": self.spec.find_unused}
        self._parallel = DataParallel(model, loss, world, **settings) if world.size > 1 else None

    # ── an update ───────────────────────────────────────────────────────────────────────────────────────────────

    def backward(self, plan: Plan, batch: Any, weight: float, stats: MakeStats | None) -> Tensor | None:
        """See AccumulatingEngine. The last backward averages over ranks; the ones before it do not communicate."""
        parallel, loss = self._parallel, None
        if not weight and parallel is None:
            return torch.zeros((), device=self.world.device)
        try:
            with nullcontext() if parallel is None or stats is not None else parallel.ddp.no_sync():
                loss = self._weighted(batch if weight else None, weight, stats)
                if weight:
                    self.check_leaves(loss, () if parallel is None else parallel.ddp.parameters())
                loss.backward()
                return loss.detach()
        except (RuntimeError, MemoryError) as error:
            if not ran_out_of_memory(error):
                raise
        if stats is None or parallel is None:
            return None
        if loss is None:
            parallel.poison()
        elif not parallel.poison_rest():
            return loss.detach()  # every gradient had arrived before
        return None

    def _weighted(self, batch: Any, weight: float, stats: MakeStats | None) -> Tensor:
        with self._autocast():
            batch = self.place(batch)
            if self._parallel is not None:
                return self._parallel.loss(batch, weight, stats)
            loss = checked_loss(self._loss(self.model, batch))
            return loss if weight == 1 else loss * weight

    def skip(self, *, last: bool) -> None:
        """See AccumulatingEngine."""
        if last and self._parallel is not None:
            self._parallel.poison()

    def all_seen(self) -> bool:
        """See AccumulatingEngine; not so if a forward's part on another device or thread comes later."""
        return self._parallel is None or self.spec.find_unused or self._norms.complete

    def apply(self, plan: Plan, stats: UpdateStats) -> Applied:
        """See AccumulatingEngine."""
        try:
            return self._apply(plan, stats)
        finally:
            self._forget()

    def _apply(self, plan: Plan, stats: UpdateStats) -> Applied:
        if self._parallel is None and (stats.failed or not stats.parts):
            return self._dropped(stats, math.nan, failed=stats.failed > 0)
        self._check_use(stats)
        grad_norm = self._clipped_norm().item()  # waits for a GPU
        if self._parallel is None:
            reduced = UpdateStats.unpack(stats.numbers(), len(stats.votes))
        else:
            reduced = self._parallel.read(plan, len(stats.votes))
        if reduced.failed:
            return self._dropped(reduced, grad_norm, failed=True)
        if self._items is not None:
            grad_norm = clip_over_items(self._parameters, self._clip, reduced.weight, grad_norm)
        if not math.isfinite(grad_norm):
            # ranks whose last backward failed halfway have sent NaN, but may have sent their stats before
            return self._dropped(reduced, grad_norm, failed=self.world.sum([stats.failed])[0] > 0)
        try:
            self._products.before_step(self.optimizer)
            metric_sq = self._metric.square(clipped=clip_factor(self._clip, grad_norm))
            self._products.fetch()  # waits for a GPU, which has no step to make yet
            if self._by_parts:
                factor, items = clip_factor(self._clip, grad_norm), self._items is not None
                tell_parts(self.optimizer, self._norms, plan, reduced, self.world, clipped=factor, items=items)
            average = self._delayed.step(plan, self.step)
            self._products.after_step(self.optimizer)
        except (RuntimeError, MemoryError) as error:
            check_memory(error, "the optimizer's state")
            raise
        return Applied(stats=reduced, grad_norm=grad_norm, applied=True, average=average, metric_sq=metric_sq)

    def _dropped(self, stats: UpdateStats, grad_norm: float, *, failed: bool) -> Applied:
        if failed and self.world.device.type == "cuda":
            torch.cuda.empty_cache()
        return Applied(stats=stats, grad_norm=grad_norm, applied=False, out_of_memory=failed)

    def drain(self) -> bool:
        """See Engine."""
        drained = self._delayed.drain(self.step, self.average)
        self._forget()
        return drained

    def step(self, plan: Plan) -> None:
        """Make one optimizer step, with the settings that the plan gives each parameter group."""
        assign(self.optimizer.param_groups, plan)
        if plan.optimizer is not None and plan.optimizer.reset:
            reset_moments(self.optimizer)
        self.optimizer.step()

    def roots(self, plan: Plan) -> Roots | None:
        """See AccumulatingEngine."""
        return self._metric.begin(plan)

    def reserve(self, plan: Plan) -> list[Tensor]:
        """See AccumulatingEngine; nothing once the optimizer's state and the gradients in flight are there."""
        state = self._state_copies + self._products.copies(plan) + (plan.average > 0) + plan.preconditioned
        copies = self._delayed.missing + (0 if self.optimizer.state else state)
        with memory_for("the optimizer's state"):
            return [torch.empty_like(p) for p in self._parameters for _ in range(copies)]

    def _check_use(self, stats: UpdateStats) -> None:
        """Check, after the first update, that gradients are dense and that DDP will not wait for any for ever.

        Raises:
            ConfigError: They are not, or parameters had no gradient.
        """
        if self._used or stats.failed or not stats.parts:
            return
        check_gradients(self._objective, every=self._parallel is not None and not self.spec.find_unused)
        self._used = True

    def _clipped_norm(self) -> Tensor:
        """Return the norm of the mean gradient, which is then clipped; a non-finite one is the same on every rank.

        With items it is not divided yet by what they are, and not clipped: see clip_over_items.
        """
        norm = norm_of(self._parameters)
        if self._clip is not None and self._items is None:
            nn.utils.clip_grads_with_norm_(self._parameters, self._clip, norm)
        return norm

    def _forget(self) -> None:
        """Drop the gradients; Optimizer.zero_grad does the same, many times slower."""
        for parameter in self._parameters:
            parameter.grad = None
        if self._parallel is not None:
            self._parallel.clear()

    # ── beside updates ──────────────────────────────────────────────────────────────────────────────────────────

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """See AccumulatingEngine."""
        with self._at_rest(), torch.inference_mode(), self._autocast():
            yield

    def _set_mode(self, mode: str) -> None:
        """Call the optimizer's train() or eval(), which schedule-free ones have."""
        if self._modes:
            getattr(self.optimizer, mode)()

    @contextmanager
    def _at_rest(self) -> Iterator[None]:
        """Give the model the parameters of an optimizer's evaluation mode inside the context.

        Afterwards they are what they were to the last bit, so that training does not depend on who looks at it.
        """
        if not self._modes:
            yield
            return
        kept = [parameter.detach().clone() for parameter in self._parameters]
        self._set_mode("eval")
        try:
            yield
        finally:
            self._set_mode("train")
            with torch.no_grad():
                for parameter, value in zip(self._parameters, kept, strict=True):
                    parameter.copy_(value)

    def functional(self) -> FunctionalObjective:
        """See Engine."""
        parameters: dict[str, Tensor] = dict(self._objective.named_parameters())
        if self._modes:
            with self._at_rest():
                parameters = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        return FunctionalObjective(
            empty_copy(self.model, self._loss),
            parameters=parameters,
            buffers=dict(self._objective.named_buffers()),
            penalties=self._penalties,
            world=self.world,
        )

    def snapshot(self) -> dict[str, bytes]:
        """See Engine; the first rank holds all.

        Raises:
            ConfigError: The state could not be read back.
        """
        if self.world.rank > 0:
            return {}
        state: dict[str, Any] = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        if self._modes:
            with self._at_rest():
                state["evaluated"] = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        if isinstance(self._loss, nn.Module):
            state["loss"] = self._loss.state_dict()
        if self._average is not None:
            state["average"] = self._average.state()
        if in_flight := self._delayed.state():
            state["delayed"] = in_flight
        return {"engine.pt": written(state)}

    def load(self, folder: Path) -> None:
        """See Engine."""
        state = read(folder / "engine.pt", self.world.device)
        try:
            self.model.load_state_dict(state["model"])
            load_module(self._loss, state.get("loss"))
            self.optimizer.load_state_dict(state["optimizer"])
            if state.get("average"):
                self.average().load(state["average"])
            self._delayed.load(state.get("delayed", ()))
        except (RuntimeError, ValueError) as error:
            raise ConfigError(f"{folder} was written with another model: {error}; give the run back its own") from None

    def close(self) -> None:
        """See Engine."""
        self._set_mode("eval")
        self._norms.close()

    def place(self, batch: Any) -> Any:
        """See AccumulatingEngine."""
        return place(batch, self.world.device, self._dtype)

    def _autocast(self) -> torch.autocast | nullcontext[None]:
        if self.spec.precision != "bfloat16":
            return nullcontext()
        return torch.autocast(self.world.device.type, dtype=torch.bfloat16)
