"""The DeepSpeed engine: ZeRO 1–3 under distgrow's own accumulation; decides nothing about batch or learning rate."""

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam
from torch import nn

from distgrow.core.errors import ConfigError, TrainingFailed
from distgrow.core.noise_stats import Measured
from distgrow.core.order import mix_int
from distgrow.core.plan import Plan
from distgrow.core.progress import Outcome
from distgrow.data.seeding import seed_generators
from distgrow.distributed.world import World
from distgrow.engine.batches import (
    MORE_MEMORY,
    Buffers,
    Loss,
    Metrics,
    WeightedLoss,
    drawn_rows,
    place,
    ran_out_of_memory,
)
from distgrow.engine.ddp import check_agreed
from distgrow.engine.deepspeed_shards import Shards
from distgrow.engine.functional import FunctionalObjective, hollow
from distgrow.engine.metrics import means
from distgrow.engine.noise_hooks import MicroBatchNorms, StepProducts
from distgrow.engine.spec import DeepSpeed
from distgrow.optim import OptimizerSpec

_DTYPES = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
#: What ZeRO 3 leaves in modules, beside names that begin with ds_.
_ZERO_3 = ("_original_parameters", "_external_params")


class DeepSpeedEngine:
    """Exact mean gradients over a global batch, with optimizer state, gradients and parameters sharded by ZeRO."""

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        *,
        metrics: Metrics | None,
        spec: DeepSpeed,
        optimizer: OptimizerSpec,
        world: World,
    ) -> None:
        deepspeed.utils.logger.setLevel("ERROR")
        warnings.filterwarnings("ignore", message="`torch.distributed", category=FutureWarning)  # DeepSpeed's own calls
        accelerator = get_accelerator()
        if spec.precision == "float16" and not (accelerator and accelerator.is_fp16_supported()):
            raise ConfigError(f"engine.precision=float16: DeepSpeed has none on {world.device.type}; use bfloat16")
        self.spec, self.world, self.evaluations = spec, world, 0
        self._metrics = metrics or (lambda model, batch: {"loss": loss(model, batch)})
        self._loss, self._penalty, self._hollow = loss, optimizer.penalty, hollow(model)
        shared = WeightedLoss(model, loss).to(world.device).train()
        self._engine: Any
        self._engine, *_ = deepspeed.initialize(
            model=shared,
            optimizer=_optimizer(list(shared.parameters()), optimizer, spec, world),
            config=settings(spec, optimizer, world),
        )
        self._buffers = Buffers(model)
        self._shards = Shards(self._engine, world, resizes=spec.resizes(optimizer))
        self._norms, self._products = MicroBatchNorms(model.parameters(), world.size), StepProducts(optimizer)
        self._products.watch(self._engine.basic_optimizer)
        self._clear_padding()

    def update(self, plan: Plan, micro_batches: Iterable[Any], votes: Sequence[bool] = ()) -> Outcome:
        """See Engine. Raises ValueError where a micro-batch does not have the rows that the plan gave it."""
        seed_generators(mix_int(plan.seed, self.world.rank), self.world.device)
        self._buffers.keep()
        self._norms.begin(plan)
        self._products.begin(plan)
        losses: list[torch.Tensor] = []
        short = False
        for batch, rows in drawn_rows(plan, self.world.rank, micro_batches):
            self.evaluations += rows
            loss = None if short else self._forward(batch, plan, rows)
            short = loss is None
            loss = self._engine(None, math.nan) if loss is None else loss  # NaN: no rank applies the update then
            with self._no_way_back(plan.micro):
                self._engine.backward(loss, scale_wrt_gas=False)
            self._norms.end(plan.weight(rows), self._loss_scale())
            losses.append(loss.detach().float())
        loss = sum(losses[1:], start=losses[0]).item() / self.world.size
        agreed = [plan.batch / self.world.size, plan.lr / self.world.size]
        known = self.world.sum_async(
            [loss, short, float(share) if (share := self._norms.total()) is not None else math.nan, *agreed, *votes]
        )
        for group in self._engine.optimizer.param_groups:
            group["lr"] = plan.lr * group.get("lr_scale", 1.0)
        self._engine.step()
        mean, lacking, parts_sq, batch, lr, *ballot = known()
        check_agreed(plan, batch, lr, self.world)
        applied, grad_norm = not self._engine.optimizer.overflow, float(self._engine.get_global_grad_norm())
        if not applied:
            self._buffers.restore()
        return Outcome(
            applied=applied,
            out_of_memory=lacking > 0,
            loss=mean,
            grad_norm=grad_norm,
            measured=self._measured(plan, parts_sq, grad_norm) if applied else Measured(),
            votes=tuple(count > 0 for count in ballot),
        )

    def _measured(self, plan: Plan, parts_sq: float, grad_norm: float) -> Measured:
        """What an applied update has shown of noise; `parts_sq` without the penalty. Collective."""
        penalty, product = 0.0, math.nan
        if self._products.wanted:
            penalty, product = self.world.sum(self._products.results(grad_norm))
        batch_sq = grad_norm * grad_norm + penalty if plan.window else math.nan
        return Measured(parts_sq=parts_sq + penalty, batch_sq=batch_sq, product=product)

    def _loss_scale(self) -> float:
        return self._engine.optimizer.loss_scale if self.spec.precision == "float16" else 1.0

    def _forward(self, batch: Any, plan: Plan, rows: int) -> torch.Tensor | None:
        """The weighted loss; None where memory did not hold it."""
        with self._no_way_back(plan.micro) if self.spec.zero == 3 else nullcontext():
            try:
                return self._engine(self._place(batch), plan.weight(rows))
            except (RuntimeError, MemoryError) as error:
                if not ran_out_of_memory(error) or self.spec.zero == 3:
                    raise
        return None

    @contextmanager
    def _no_way_back(self, micro: int) -> Iterator[None]:
        """TrainingFailed where memory does not hold what ranks do together here: the others cannot be called back."""
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            if not ran_out_of_memory(error):
                raise
            raise TrainingFailed(
                f"rank {self.world.rank} ran out of memory with micro-batches of {micro} rows, within a step that ZeRO "
                f"{self.spec.zero} cannot repeat; "
                + (f"set engine.max_micro={micro // 2} and go on with --resume" if micro > 1 else MORE_MEMORY)
            ) from error

    def evaluate(self, batches: Iterable[tuple[Any, int]]) -> dict[str, float]:
        """See Engine."""
        model = self._engine.module.model
        self.world.share(list(model.buffers()))
        was_training = model.training
        self._engine.eval()
        with torch.no_grad():  # not inference mode: ZeRO 3 gathers parameters into tensors that training uses again
            found = means(lambda batch: self._metrics(model, self._place(batch)), batches, self.world)
        self._engine.train(was_training)
        return found

    def functional(self) -> FunctionalObjective:
        """See Engine; from the parameters that the forward pass uses, rounded where it is in half precision."""
        model = self._engine.module.model
        return FunctionalObjective(
            self._hollow,
            self._loss,
            parameters={name: self._whole(parameter) for name, parameter in model.named_parameters()},
            buffers=dict(model.named_buffers()),
            penalty=self._penalty,
            world=self.world,
        )

    def _whole(self, parameter: nn.Parameter) -> torch.Tensor:
        """A parameter, of which ZeRO 3 leaves each rank a part. Collective."""
        if self.spec.zero < 3:
            return parameter
        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().to(self.world.device, copy=True)

    def snapshot(self) -> dict[str, bytes]:
        """See Engine; every rank holds its shards."""
        return self._shards.snapshot()

    def load(self, folder: Path) -> None:
        """See Engine."""
        self._shards.load(folder)
        self._clear_padding()

    def close(self) -> None:
        """See Engine; ZeRO 3's parameters are gathered first, in the precision that the forward pass uses."""
        module = self._engine.module
        whole = {parameter: self._whole(parameter) for parameter in module.parameters()} if self.spec.zero == 3 else {}
        self._engine.destroy()
        self._norms.close()
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

    def _place(self, batch: Any) -> Any:
        return place(batch, self.world.device, _DTYPES[self.spec.precision])


def give_back(module: nn.Module, whole: Mapping[nn.Parameter, torch.Tensor]) -> None:
    """Put new parameters, with the values in `whole`, in the place of ZeRO 3's; ties stay tied."""
    new = {old: nn.Parameter(value, requires_grad=old.requires_grad) for old, value in whole.items()}
    for part in module.modules() if new else ():
        parameters = {name: old if old is None else new[old] for name, old in part._parameters.items()}
        for name in [name for name in vars(part) if name.startswith("ds_") or name in _ZERO_3]:
            delattr(part, name)
        part._parameters = parameters


def settings(spec: DeepSpeed, optimizer: OptimizerSpec, world: World) -> dict[str, Any]:
    """DeepSpeed's config. Its own batch sizes are placeholders: accumulation and weighting are the caller's."""
    zero: dict[str, Any] = {"stage": spec.zero, "reduce_bucket_size": int(spec.bucket_mb * 2**20 / 4)}
    if spec.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu"}
    if spec.offload_parameters:
        zero["offload_param"] = {"device": "cpu"}
    precision: dict[str, Any] = {}
    if spec.precision == "bfloat16":
        precision["bf16"] = {"enabled": True, "check_grad_overflow": True}
    if spec.precision == "float16":
        power, window = spec.loss_scale_power, spec.loss_scale_window
        precision["fp16"] = {
            "enabled": True,
            "initial_scale_power": power,
            "loss_scale_window": window,
            "hysteresis": 1,
        }
    if precision:
        precision["data_types"] = {"grad_accum_dtype": "fp32"}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "train_batch_size": world.size,
        "managed_gradient_accumulation": False,
        "gradient_clipping": optimizer.clip or 0.0,  # unsaid, it would be 1
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**12,
        **precision,
    }


def _optimizer(
    parameters: list[nn.Parameter], optimizer: OptimizerSpec, spec: DeepSpeed, world: World
) -> torch.optim.Optimizer:
    kernel: dict[str, Any] | None = optimizer.fused_adamw() if spec.fused else None
    if kernel is None:
        return optimizer.build(parameters)
    if spec.offload_optimizer or world.device.type == "cpu":
        return DeepSpeedCPUAdam(parameters, lr=0.0, adamw_mode=True, **kernel)
    return FusedAdam(parameters, lr=0.0, **kernel)
