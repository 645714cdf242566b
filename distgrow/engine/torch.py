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
from distgrow.core.sparsity import Sparsity
from distgrow.distributed.world import World
from distgrow.engine.batches import Loss, Metrics, checked_loss, place, ran_out_of_memory
from distgrow.engine.ddp import DataParallel
from distgrow.engine.functional import FunctionalObjective
from distgrow.engine.items import Items
from distgrow.engine.masks import Masks, masks_of
from distgrow.engine.noise.metric import Roots
from distgrow.engine.objective import compile_in_place, empty_copy, to_precision
from distgrow.engine.raw_backward import backward
from distgrow.engine.spec import Torch
from distgrow.engine.state import load_module, read, written
from distgrow.engine.stats import Applied, MakeStats, UpdateStats
from distgrow.engine.torch_step import TorchStep
from distgrow.engine.update import AccumulatingEngine
from distgrow.engine.used_parameters import check_gradients
from distgrow.optim import OptimizerSpec
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
        self.optimizer = optimizer.ready(self._objective.named(), model)
        self.delay, self._used = self.spec.delay, False
        self._step = TorchStep(
            optimizer, self.optimizer, self._parameters,
            norms=self._norms, products=self._products, world=world, items=items is not None, delay=self.delay,
        )  # fmt: skip
        self._parallel = self._data_parallel(model, loss) if world.size > 1 else None

    def _data_parallel(self, model: nn.Module, loss: Loss) -> DataParallel | None:
        """Return what averages gradients over ranks as backward makes them; None: `apply` does it."""
        spec = self.spec
        return DataParallel(model, loss, self.world, bucket_mb=spec.bucket_mb, find_unused=spec.find_unused)

    # ── an update ───────────────────────────────────────────────────────────────────────────────────────────────

    def backward(self, plan: Plan, batch: Any, weight: float, stats: MakeStats | None) -> Tensor | None:
        """See AccumulatingEngine. The last backward averages over ranks; the ones before it do not communicate."""
        parallel, loss = self._parallel, None
        if not weight and parallel is None and plan.expected is None:
            return torch.zeros((), device=self.world.device)
        try:
            with nullcontext() if parallel is None or stats is not None else parallel.ddp.no_sync():
                loss = self._weighted(batch if weight else None, weight, stats)
                if weight:
                    self.check_leaves(loss, () if parallel is None else parallel.ddp.parameters())
                backward(loss)
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
            if batch is None:
                return self._objective(None, weight)
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
        if self._parallel is None and (stats.failed or (not stats.parts and plan.expected is None)):
            return self._dropped(stats, math.nan, failed=stats.failed > 0)
        self._check_use(stats)
        reduced, grad_norm = self._reduced(plan, stats)
        if reduced.failed:
            return self._dropped(reduced, grad_norm, failed=True)
        if not math.isfinite(grad_norm):
            # ranks whose last backward failed halfway have sent NaN, but may have sent their stats before
            return self._dropped(reduced, grad_norm, failed=self.world.sum([stats.failed])[0] > 0)
        average, metric_sq = self._step.make(plan, reduced, grad_norm)
        return Applied(stats=reduced, grad_norm=grad_norm, applied=True, average=average, metric_sq=metric_sq)

    def _reduced(self, plan: Plan, stats: UpdateStats) -> tuple[UpdateStats, float]:
        """Make the gradients means over ranks and items, clipped; return the means of `stats`, and the norm between."""
        grad_norm = self._step.clipped_norm().item()  # waits for a GPU
        reduced = stats.read() if self._parallel is None else self._parallel.read(plan, len(stats.votes))
        return reduced, grad_norm if reduced.failed else self._step.over_items(reduced.weight, grad_norm)

    def _dropped(self, stats: UpdateStats, grad_norm: float, *, failed: bool) -> Applied:
        if failed and self.world.device.type == "cuda":
            torch.cuda.empty_cache()
        return Applied(stats=stats, grad_norm=grad_norm, applied=False, out_of_memory=failed)

    def prune_by(self, sparsity: Sparsity | None) -> None:
        """Prune the model when plans ask for it; None: it stays dense. ConfigError if there is nothing to prune."""
        self._masks = masks_of(self.model, self._objective.named(), sparsity, self.world, self._pruned)
        self._step.masks = self._masks

    def _pruned(self, masks: Masks) -> None:
        self._step.pruned(masks)
        if self._average is not None:
            self._average.prune(masks.named(self._objective))

    def drain(self) -> bool:
        """See Engine."""
        drained = self._step.drain(self.average)
        self._forget()
        return drained

    def step(self, plan: Plan) -> None:
        """Make one optimizer step with the gradients that the parameters have."""
        self._step.step(plan)

    def roots(self, plan: Plan) -> Roots | None:
        """See AccumulatingEngine."""
        return self._step.roots(plan)

    def reserve(self, plan: Plan) -> list[Tensor]:
        """See AccumulatingEngine; nothing once the optimizer's state and the gradients in flight are there."""
        return self._step.reserve(plan)

    def parameter_noise(self) -> dict[str, tuple[float, float]]:
        """See Engine."""
        names = {parameter: name for name, parameter in self._objective.named().items()}
        pairs = zip(self._parameters, self._step.noise.figures(), strict=True)
        return {names[parameter]: figures for parameter, figures in pairs if parameter.requires_grad}

    def _check_use(self, stats: UpdateStats) -> None:
        """Check, after the first update, that gradients are dense and that DDP will not wait for any for ever.

        Raises:
            ConfigError: They are not, or parameters had no gradient.
        """
        if self._used or stats.failed or not stats.parts:
            return
        check_gradients(self._objective, every=self._parallel is not None and not self.spec.find_unused)
        self._used = True

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
        with self._step.at_rest(), torch.inference_mode(), self._autocast():
            yield

    def functional(self) -> FunctionalObjective:
        """See Engine."""
        parameters: dict[str, Tensor] = dict(self._objective.named_parameters())
        with self._step.at_rest() as at_rest:
            if at_rest:
                parameters = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        return FunctionalObjective(
            empty_copy(self.model, self._loss),
            parameters=parameters,
            buffers=dict(self._objective.named_buffers()),
            penalties=self._penalties,
            world=self.world,
            masks=None if self._masks is None else self._masks.named(self._objective),
        )

    def snapshot(self) -> dict[str, bytes]:
        """See Engine; the first rank holds all.

        Raises:
            ConfigError: The state could not be read back.
        """
        if self.world.rank > 0:
            return {}
        state: dict[str, Any] = {"model": self.model.state_dict(), **self._step.state()}
        with self._step.at_rest() as at_rest:
            if at_rest:
                state["evaluated"] = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        if isinstance(self._loss, nn.Module):
            state["loss"] = self._loss.state_dict()
        if self._average is not None:
            state["average"] = self._average.state()
        if self._masks is not None:
            state["masks"] = self._masks.state()
        return {"engine.pt": written(state)}

    def load(self, folder: Path) -> None:
        """See Engine."""
        state = read(folder / "engine.pt", self.world.device)
        try:
            self.model.load_state_dict(state["model"])
            load_module(self._loss, state.get("loss"))
            self._step.load(state)
            if self._masks is not None:
                self._masks.load(state.get("masks", {}))
            self._average = None  # it may not have begun
            if state.get("average"):
                self.average().load(state["average"])
        except (RuntimeError, ValueError) as error:
            raise ConfigError(f"{folder} was written with another model: {error}; give the run back its own") from None

    def close(self) -> None:
        """See Engine."""
        self._step.set_mode("eval")
        self._norms.close()
        if self._masks is not None:
            self._masks.close()

    def place(self, batch: Any) -> Any:
        """See AccumulatingEngine."""
        return place(batch, self.world.device, self._dtype)

    def _autocast(self) -> torch.autocast | nullcontext[None]:
        if self.spec.precision != "bfloat16":
            return nullcontext()
        return torch.autocast(self.world.device.type, dtype=torch.bfloat16)
