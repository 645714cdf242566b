"""The DeepSpeed engine: ZeRO 1–3 under distgrow's own accumulation; decides nothing about batch or learning rate."""

import math
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from torch import nn

from distgrow.core.errors import ConfigError, RunError
from distgrow.core.plan import Plan
from distgrow.core.sparsity import Sparsity
from distgrow.distributed.world import World
from distgrow.engine.batches import Buffers, Loss, Metrics, no_way_back, place, ran_out_of_memory
from distgrow.engine.deepspeed.build_locks import let_builds_begin
from distgrow.engine.deepspeed.config import settings
from distgrow.engine.deepspeed.groups import forget_lost_groups
from distgrow.engine.deepspeed.optimizer import build_optimizer, join_matrices
from distgrow.engine.deepspeed.parameters import give_back, masks_of_shards, masters, prune_shards, refuse_complex
from distgrow.engine.deepspeed.shards import Shards
from distgrow.engine.deepspeed.step import divided
from distgrow.engine.functional import FunctionalObjective
from distgrow.engine.items import Items
from distgrow.engine.masks import Masks, masks_of
from distgrow.engine.objective import WeightedLoss, empty_copy
from distgrow.engine.spec import DeepSpeed
from distgrow.engine.state import read, written
from distgrow.engine.stats import Applied, MakeStats, UpdateStats, check_agreed
from distgrow.engine.update import AccumulatingEngine
from distgrow.engine.used_parameters import UsedParameters
from distgrow.optim import OptimizerSpec
from distgrow.optim.at_growth import assign, reset_moments
from distgrow.optim.groups import assign_lr

_DTYPES = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
#: The file of a checkpoint that holds the masks of pruned weights.
_MASKS = "masks.pt"


class DeepSpeedEngine(AccumulatingEngine):
    """Train with optimizer state, gradients and parameters sharded by ZeRO."""

    sharded = True

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        *,
        metrics: Metrics | None,
        spec: DeepSpeed,
        optimizer: OptimizerSpec,
        world: World,
        items: Items | None = None,
    ) -> None:
        deepspeed.utils.logger.setLevel("ERROR")
        warnings.filterwarnings("ignore", message="`torch.distributed", category=FutureWarning)  # DeepSpeed's own calls
        accelerator = get_accelerator()
        if spec.precision == "float16" and not (accelerator and accelerator.is_fp16_supported()):
            raise ConfigError(f"engine.precision=float16: DeepSpeed has none on {world.device.type}; use bfloat16")
        self.spec, self._empty = spec, empty_copy(model, loss)
        super().__init__(model, loss, metrics=metrics, optimizer=optimizer, world=world, items=items)
        refuse_complex(self._parameters)
        self._objective.to(world.device).train()
        self._engine: Any = _initialized(self._objective, spec, optimizer, world)
        self._buffers = Buffers(self._objective)  # on the device, in the engine's precision
        self._shards = Shards(self._engine, world, resizes=spec.resizes(optimizer))
        self._products.watch(self._engine.basic_optimizer)  # before the settings of the last step are replaced
        if optimizer.at_growth.changes:
            self._engine.basic_optimizer.register_step_pre_hook(self._assign)
        self._clear_padding()
        named = {name.removeprefix("model."): p for name, p in self._objective.named_parameters() if p.requires_grad}
        self._used = UsedParameters(named, world)
        self._kept: list[torch.Tensor] = []  # masks of the shards; empty until something is pruned
        self._plan: Plan | None = None  # of the update under way
        self._last: Any = None  # with items, the last micro-batch
        self._counted: Any = None  # the last of those that count something
        if items is not None and isinstance(loss, nn.Module) and list(loss.parameters()):
            raise ConfigError("items and a loss with parameters of its own need engine.kind=torch")

    # ── an update ───────────────────────────────────────────────────────────────────────────────────────────────

    def backward(self, plan: Plan, batch: Any, weight: float, stats: MakeStats | None) -> torch.Tensor | None:
        """See AccumulatingEngine."""
        if self._items is not None:
            self._last, self._counted = batch, batch if weight else self._counted
        with self._no_way_back(plan.micro) if self.spec.zero == 3 else nullcontext():
            loss = self._forward(batch, weight)
        if loss is None:
            self.skip(last=stats is not None)
            return None
        if weight:
            self.check_leaves(loss)
        self._used.begin()
        with self._no_way_back(plan.micro):
            self._engine.backward(loss, scale_wrt_gas=False)
        self._used.end()
        return loss.detach().float()

    def _forward(self, batch: Any, weight: float) -> torch.Tensor | None:
        """Return the weighted loss, None if memory did not hold it and the other ranks can be told."""
        try:
            if weight:
                return self._engine(self.place(batch), weight)
            return self._nothing(0.0)
        except (RuntimeError, MemoryError) as error:
            if not ran_out_of_memory(error) or self.spec.zero == 3:
                raise
        return None

    def skip(self, *, last: bool) -> None:
        """See AccumulatingEngine; every micro-batch reduces, and DeepSpeed applies no gradient that has NaN in it."""
        self._engine.backward(self._nothing(math.nan), scale_wrt_gas=False)

    def _nothing(self, weight: float) -> torch.Tensor:
        """Return `weight` through all that has a gradient, in place of a loss.

        Ranks reduce gradients in the order in which they come, so the graph must be that of the ranks with a loss. It
        is if an earlier micro-batch stands in.
        """
        if self._counted is not None:
            return self._engine(self.place(self._counted), weight)
        return self._engine(self.place(self._last), weight, without_loss=True)

    def apply(self, plan: Plan, stats: UpdateStats) -> Applied:
        """See AccumulatingEngine."""
        reduced = self.world.sum_async([value / self.world.size for value in stats.numbers()])
        self._plan = plan
        assign_lr(self._engine.optimizer.param_groups, plan.lr)
        weight = UpdateStats.unpack(reduced(), len(stats.votes)).weight if self._items is not None else 1.0
        if not weight:
            self.skip(last=True)
        with self._no_way_back(plan.micro), divided(self._engine.optimizer, weight or 1.0):
            self._engine.step()
        known = UpdateStats.unpack(reduced(), len(stats.votes))
        if not known.failed:
            check_agreed(plan, known, self.world)
            self._used.agree()
        grad_norm, overflow = float(self._engine.get_global_grad_norm()), self._engine.optimizer.overflow
        return Applied(stats=known, grad_norm=grad_norm, applied=not overflow, out_of_memory=known.failed > 0)

    def _assign(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        """Give the groups of a step what the plan gives them; ZeRO has a step for each group or shard."""
        assert self._plan is not None
        assign(optimizer.param_groups, self._plan)
        if self._plan.optimizer is not None and self._plan.optimizer.reset:
            reset_moments(optimizer)

    def loss_scale(self) -> float:
        """See AccumulatingEngine."""
        return self._engine.optimizer.loss_scale if self.spec.precision == "float16" else 1.0

    def _no_way_back(self, micro: int) -> AbstractContextManager[None]:
        """Return a context that ends the run if memory does not hold what is done in it."""
        return no_way_back(self.world.rank, micro, f"ZeRO {self.spec.zero}")

    # ── beside updates ──────────────────────────────────────────────────────────────────────────────────────────

    def evaluating(self) -> AbstractContextManager[Any]:
        """See AccumulatingEngine; not inference mode, as ZeRO 3 gathers parameters into tensors that training uses."""
        return torch.no_grad()

    def averaged(self) -> dict[str, torch.Tensor]:
        """See AccumulatingEngine: float32 shards, whatever precision the forward pass uses."""
        return {
            **{f"shard {k}": shard for k, shard in enumerate(masters(self._engine.optimizer))},
            **dict(self._objective.named_buffers()),
        }

    def prune_by(self, sparsity: Sparsity | None) -> None:
        """Prune the model when plans ask for it; None: it stays dense. ConfigError if there is nothing to prune."""
        self._masks = masks_of(self.model, self._objective.named(), sparsity, self.world, self._pruned)
        if self._masks is not None:
            self._engine.basic_optimizer.register_step_post_hook(self._zero_pruned)

    def _pruned(self, masks: Masks) -> None:
        self._kept = prune_shards(self._engine, masks, self.world.rank)
        if self._average is not None:
            self._average.prune({f"shard {k}": mask for k, mask in enumerate(self._kept)})

    def _zero_pruned(self, *_: object) -> None:
        """Set pruned weights to 0 after a step, whatever the optimizer has made of a gradient of 0."""
        for shard, mask in zip(masters(self._engine.optimizer), self._kept, strict=bool(self._kept)):
            shard.data.mul_(mask)

    @contextmanager
    def at_average(self) -> Iterator[bool]:
        """See Engine."""
        with super().at_average() as there:
            if there:
                self._use_shards()
            yield there
        if there:
            self._use_shards()

    def _use_shards(self) -> None:
        """Make the forward pass use what the float32 shards hold now. Collective."""
        zero = self._engine.optimizer
        if self.spec.zero < 3:
            zero.update_lp_params()
            return
        zero._partition_all_parameters()
        for group in range(len(zero.fp32_partitioned_groups_flat)):
            zero._reassign_or_swap_out_partitioned_parameters(group)
        if zero.persistent_parameters:
            zero.persistent_parameters[0].all_gather(zero.persistent_parameters)

    def functional(self) -> FunctionalObjective:
        """See Engine; from the parameters that the forward pass uses, rounded if that is in half precision."""
        return FunctionalObjective(
            self._empty,
            parameters={name: self._whole(parameter) for name, parameter in self._objective.named_parameters()},
            buffers=dict(self._objective.named_buffers()),
            penalties=self._penalties,
            world=self.world,
            masks=None if self._masks is None else self._masks.named(self._objective),
        )

    def _whole(self, parameter: nn.Parameter) -> torch.Tensor:
        """Return a whole parameter, of which ZeRO 3 leaves each rank a part. Collective."""
        if self.spec.zero < 3:
            return parameter
        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().to(self.world.device, copy=True)

    def snapshot(self) -> dict[str, bytes]:
        """See Engine; every rank holds its shards."""
        average = {} if self._average is None else {_average_file(self.world.rank): written(self._average.state())}
        masks = {} if self._masks is None or self.world.rank else {_MASKS: written(self._masks.state())}
        return {**self._shards.snapshot(), **average, **masks}

    def load(self, folder: Path) -> None:
        """See Engine."""
        written_by = len(list(folder.glob(_average_file("*"))))
        if written_by not in (0, self.world.size):
            raise RunError(
                f"{folder} holds an average of the parameters that {written_by} ranks have cut into shards; go on with "
                f"{written_by} ranks, or use engine.kind=torch from the start"
            )
        self._shards.load(folder)
        self._clear_padding()
        if self._masks is not None:
            self._masks.load(read(folder / _MASKS, self.world.device))
            pruned = self._masks.density < 1
            self._kept = masks_of_shards(self._engine.optimizer, self._masks, self.world.rank) if pruned else []
        self._average = None  # it may not have begun
        if written_by:
            self.average().load(read(folder / _average_file(self.world.rank), self.world.device))

    def close(self) -> None:
        """See Engine; ZeRO 3's parameters are gathered first, in the precision that the forward pass uses."""
        module = self._objective
        whole = {parameter: self._whole(parameter) for parameter in module.parameters()} if self.spec.zero == 3 else {}
        self._engine.destroy()
        self._norms.close()
        self._used.close()
        if self._masks is not None:
            self._masks.close()
        give_back(module, whole)

    def _clear_padding(self) -> None:
        """Zero what pads ZeRO 3's float32 shards to equal lengths: memory as it was found, which norms would count."""
        if self.spec.zero < 3:
            return
        optimizer = self._engine.optimizer
        for shard, group in zip(optimizer.fp32_partitioned_groups_flat, optimizer.fp16_groups, strict=True):
            pieces = shard.data.split([parameter.partition_numel() for parameter in group])
            for piece, parameter in zip(pieces, group, strict=True):
                piece[max(0, parameter.ds_numel - self.world.rank * len(piece)) :].zero_()

    def place(self, batch: Any) -> Any:
        """See AccumulatingEngine."""
        return place(batch, self.world.device, _DTYPES[self.spec.precision])


def _average_file(rank: int | str) -> str:
    """Return the name of the file that holds a rank's part of the average."""
    return f"average-{rank}.pt"


def _initialized(objective: WeightedLoss, spec: DeepSpeed, optimizer: OptimizerSpec, world: World) -> Any:
    """Return DeepSpeed's engine, whose operators may be compiled meanwhile."""
    let_builds_begin(world)
    forget_lost_groups()
    engine, *_ = deepspeed.initialize(
        model=objective,
        optimizer=build_optimizer(objective, optimizer, spec, world),
        config=settings(spec, optimizer, world),
    )
    join_matrices(engine, spec, world)
    return engine
