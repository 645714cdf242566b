"""The FSDP engine: torch's fully_shard under distgrow's own accumulation; decides nothing about batch or rate."""

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distgrow.core.errors import ConfigError
from distgrow.core.plan import Plan
from distgrow.distributed.world import World
from distgrow.engine.batches import (
    MORE_MEMORY,
    Buffers,
    Loss,
    Metrics,
    map_leaves,
    memory_for,
    no_way_back,
    place,
    ran_out_of_memory,
)
from distgrow.engine.clipping import clip_over_items, root_of
from distgrow.engine.fsdp.mesh import mesh_of
from distgrow.engine.fsdp.meta import Maker
from distgrow.engine.fsdp.root import Root, ShardProducts, single
from distgrow.engine.fsdp.shards import Rows, Shards, check_parameters, give_back, has_room
from distgrow.engine.fsdp.spec import FSDP
from distgrow.engine.fsdp.state import State
from distgrow.engine.fsdp.wrap import Undo, checkpoint_in_place, chosen, compile_units, units_of
from distgrow.engine.functional import FunctionalObjective
from distgrow.engine.items import Items
from distgrow.engine.noise.hooks import MicroBatchNorms
from distgrow.engine.objective import empty_copy, on_meta
from distgrow.engine.raw_backward import backward
from distgrow.engine.stats import MakeStats, UpdateStats, check_agreed
from distgrow.engine.update import AccumulatingEngine, Applied
from distgrow.engine.used_parameters import UsedParameters
from distgrow.optim import OptimizerSpec
from distgrow.optim.at_growth import assign, reset_moments
from distgrow.optim.composite import has_modes, repoint


class FSDPEngine(AccumulatingEngine):
    """Train with parameters, gradients and optimizer state in shards."""

    sharded = True

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        *,
        metrics: Metrics | None,
        spec: FSDP,
        optimizer: OptimizerSpec,
        world: World,
        items: Items | None = None,
    ) -> None:
        spec.check_device(world)
        self.spec, self._empty = spec, empty_copy(model, loss)
        super().__init__(model, loss, metrics=metrics, optimizer=optimizer, world=world, items=items)
        root = Root(model, loss).train()
        named = dict(root.named_parameters())
        check_parameters(named)
        mesh, units = mesh_of(spec, world), units_of(model, spec.wrap)
        maker = Maker(model, world.device, world.on_rank0(torch.initial_seed)) if on_meta(root) else None
        world.share([t.detach() for t in (*named.values(), *root.buffers()) if not t.is_meta])
        self.optimizer = optimizer.ready(self._objective.named(), model)
        if has_modes(self.optimizer):
            raise ConfigError(
                f"optimizer.kind={optimizer.name} evaluates at other parameters than it trains, which engine.kind=fsdp "
                "does not: use engine.kind=torch"
            )
        self._undo = Undo(root)
        self._prepare(root, units)
        self._shards = Shards(root, [unit for _, unit in units], spec, mesh, maker and maker.make)
        repoint(self.optimizer, {id(p): self._shards.local[name] for name, p in named.items()})
        for one in getattr(self.optimizer, "optimizers", [self.optimizer]):
            if optimizer.joins and hasattr(one, "joined"):
                one.joined = Rows(self._shards)
        self._root = self._objective = root
        root.left = self._shards.rest
        self._watch(optimizer, items)
        self._state = State(root, self.optimizer, self._shards)

    def _prepare(self, root: Root, units: list[tuple[str, nn.Module]]) -> None:
        """Do to units what comes before they are cut."""
        for unit in chosen(units, self.spec.checkpoint_blocks):
            checkpoint_in_place(unit)
        if self.spec.compile:
            compile_units(units, root.model)
        if self.spec.precision == "bfloat16":
            root.model.register_forward_hook(lambda _, given, returned: map_leaves(single, returned))
        root.let_in()

    def _watch(self, optimizer: OptimizerSpec, items: Items | None) -> None:
        """Measure and check what parameters get while they are gathered."""
        whole = self._shards.whole
        self._parameters, self._buffers = list(whole.values()), Buffers(self._root)
        self._norms = MicroBatchNorms(self._parameters, self.world.size)
        self._products = ShardProducts(optimizer, self._shards.replicas)
        trained = {name.removeprefix("model."): p for name, p in whole.items() if p.requires_grad}
        self._used = None if self.spec.find_unused else UsedParameters(trained, self.world, "fsdp")
        evaluated = self._metrics
        self._metrics = lambda model, batch: self._root(None, 0.0, call=partial(evaluated, model, batch))
        self._last: Any = None  # with items, the last micro-batch
        self._counted: Any = None  # the last of those that count something
        if items is not None and isinstance(self._loss, nn.Module) and list(self._loss.parameters()):
            raise ConfigError("items and a loss with parameters of its own need engine.kind=torch")

    # ── an update ───────────────────────────────────────────────────────────────────────────────────────────────

    def backward(self, plan: Plan, batch: Any, weight: float, stats: MakeStats | None) -> Tensor | None:
        """See AccumulatingEngine. The last backward averages over ranks."""
        if plan.probe:
            return self._tried(batch, weight)
        if self._items is not None:
            self._last, self._counted = batch, batch if weight else self._counted
        self._shards.sync(last=stats is not None)
        with self._no_way_back(plan.micro):
            loss = self._root(self.place(batch), weight) if weight else self._nothing()
            if weight:
                self.check_leaves(loss)
            if self._used is not None:
                self._used.begin()
            backward(loss)
            if self._used is not None:
                self._used.end()
        return loss.detach().float()

    def _tried(self, batch: Any, weight: float) -> Tensor | None:
        """Compute the gradient of a trial, which no rank waits for; None if memory did not hold it.

        It is accumulated nowhere, as torch's `reset_iter_state` would leave it where it is.
        """
        trained = [parameter for parameter in self._shards.whole.values() if parameter.requires_grad]
        try:
            loss = self._root(self.place(batch), weight)
            torch.autograd.grad(loss, trained, allow_unused=True)
            return loss.detach().float()
        except (RuntimeError, MemoryError) as error:
            if not ran_out_of_memory(error):
                raise
        return None

    def reserve(self, plan: Plan) -> list[Tensor]:
        """See AccumulatingEngine: the optimizer's state, averages, and what is accumulated and reduced.

        All parameters are gathered, so that a trial's ranks need not wait for one another.
        """
        with memory_for(
            "all parameters at once, as trials need them", "give engine.max_micro a number, or " + MORE_MEMORY
        ):
            self._shards.gather()
        state = 0 if self.optimizer.state else self._optimizer_spec.state_copies
        copies = state + self._products.copies(plan) + (plan.average > 0)
        with memory_for("the optimizer's state"):
            shards = [torch.empty_like(p) for p in self._shards.local.values() for _ in range(copies)]
            return [*shards, *(torch.empty(size, device=self.world.device) for size in self._shards.accumulated())]

    def _judged(self, stats: UpdateStats) -> Applied:
        """Return whether every rank's memory held a trial. Collective."""
        failed = self.world.sum([stats.failed])[0] > 0
        self._shards.dissolve()
        if failed and self.world.device.type == "cuda":
            torch.cuda.empty_cache()
        return Applied(stats=stats, grad_norm=math.nan, applied=False, out_of_memory=failed)

    def _nothing(self) -> Tensor:
        """Return 0 through all that has a gradient, in place of a loss that may be 0/0: ranks gather together."""
        if self._counted is not None:
            return self._root(self.place(self._counted), 0.0)
        return self._root(self.place(self._last), 0.0, without_loss=True)

    def skip(self, *, last: bool) -> None:
        """See AccumulatingEngine; only a trial goes on once memory did not hold a micro-batch, and it has one."""
        raise AssertionError("a lack of memory ends the run")

    def apply(self, plan: Plan, stats: UpdateStats) -> Applied:
        """See AccumulatingEngine."""
        if plan.probe:
            return self._judged(stats)
        try:
            with torch.no_grad(), self._no_way_back(plan.micro):
                return self._apply(plan, stats)
        finally:
            self._shards.forget()

    def _apply(self, plan: Plan, stats: UpdateStats) -> Applied:
        reduced, grad_norm = self._reduced(plan, stats)
        weight = reduced.weight if self._items is not None else 1.0
        grad_norm = clip_over_items(list(self._shards.local.values()), self._optimizer_spec.clip, weight, grad_norm)
        if not math.isfinite(grad_norm):
            return Applied(stats=reduced, grad_norm=grad_norm, applied=False)
        self._products.before_step(self.optimizer)
        self._products.fetch()
        self._step(plan)
        self._products.after_step(self.optimizer)
        return Applied(stats=reduced, grad_norm=grad_norm, applied=True)

    def _step(self, plan: Plan) -> None:
        """Make one optimizer step, with the settings that the plan gives each parameter group."""
        assign(self.optimizer.param_groups, plan)
        self._reset(plan)
        self.optimizer.step()

    def _reset(self, plan: Plan) -> None:
        """Have the optimizer forget its first moments if the plan says so. Again, it changes nothing more."""
        if plan.optimizer is not None and plan.optimizer.reset:
            reset_moments(self.optimizer)

    def _reduced(self, plan: Plan, stats: UpdateStats) -> tuple[UpdateStats, float]:
        """Return the means of `stats` over ranks, and the norm of the gradient, all by one sum."""
        square = float(self._square())
        means = [value / self.world.size for value in stats.numbers()]
        *numbers, square = self.world.sum([*means, square])
        reduced = UpdateStats.unpack(numbers, len(stats.votes))
        check_agreed(plan, reduced, self.world)
        if self._used is not None:
            self._used.agree()
        return reduced, root_of(square)

    def _square(self) -> Tensor:
        """Give the shards their gradients; return what this rank adds to the squared norm of the whole, in float64."""
        gradients = self._shards.take_gradients()
        norms = (
            torch.stack(torch._foreach_norm(gradients))  # pyright: ignore[reportPrivateImportUsage]
            if gradients
            else torch.zeros(1, device=self.world.device)
        )
        return norms.double().square().sum() / self._shards.replicas

    def _no_way_back(self, micro: int) -> AbstractContextManager[None]:
        """Return a context that ends the run if memory does not hold what is done in it."""
        return no_way_back(self.world.rank, micro, "engine.kind=fsdp")

    # ── beside updates ──────────────────────────────────────────────────────────────────────────────────────────

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """See AccumulatingEngine; not inference mode, as gathered tensors are used in training again."""
        with torch.no_grad():
            yield
        self._shards.rest()

    def averaged(self) -> dict[str, Tensor]:
        """See AccumulatingEngine: shards, in the precision of steps."""
        shards = {name: shard.detach() for name, shard in self._shards.local.items() if shard.requires_grad}
        return {**shards, **dict(self._root.named_buffers())}

    def functional(self) -> FunctionalObjective:
        """See Engine; every rank gathers all parameters."""
        return FunctionalObjective(
            self._empty,
            parameters={name: self._shards.gathered(name) for name in self._shards.cut},
            buffers=dict(self._root.named_buffers()),
            penalties=self._penalties,
            world=self.world,
        )

    def snapshot(self) -> dict[str, bytes]:
        """See Engine; every rank holds its shards."""
        return self._state.snapshot(self._average, first=self.world.rank == 0)

    def load(self, folder: Path) -> None:
        """See Engine."""
        self._average = None  # it may not have begun
        self._state.load(folder, self.average, self.world)

    def close(self) -> None:
        """See Engine; every rank gathers all parameters, in the host's memory if its device has no room for them."""
        self._norms.close()
        if self._used is not None:
            self._used.close()
        whole = {name: self._shards.gathered(name).cpu() for name in self._shards.cut}
        self._undo()
        give_back(self._root, whole, self._shards.cut)
        self._root.to(self.world.device if has_room(self.world.device, whole.values()) else "cpu")

    def place(self, batch: Any) -> Any:
        """See AccumulatingEngine."""
        return place(batch, self.world.device, torch.bfloat16 if self.spec.precision == "bfloat16" else None)
