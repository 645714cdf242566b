"""The optimizer that ZeRO shards: torch's, or DeepSpeed's own kernel; knows no engine."""

from typing import Any

import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam

from distgrow.distributed.world import World
from distgrow.engine.deepspeed.matrices import Matrices, cuts_of
from distgrow.engine.objective import WeightedLoss
from distgrow.engine.spec import DeepSpeed
from distgrow.optim import OptimizerSpec
from distgrow.optim.at_growth import remember


def build_optimizer(
    objective: WeightedLoss, optimizer: OptimizerSpec, spec: DeepSpeed, world: World
) -> torch.optim.Optimizer:
    """Build the optimizer of all parameters, by DeepSpeed's kernel if `spec` asks for it."""
    kernel: dict[str, Any] | None = optimizer.fused_adamw() if spec.fused else None
    if kernel is None:
        return optimizer.ready(objective.named(), objective.model)
    groups = [group.for_torch() for group in optimizer.grouped(objective.named())]
    on_host = spec.offload_optimizer or world.device.type == "cpu"
    kind, more = (DeepSpeedCPUAdam, {"adamw_mode": True}) if on_host else (FusedAdam, {})
    made = kind(groups, lr=0.0, **more, **kernel)
    remember(made, optimizer.at_growth, optimizer.name)
    return made


def join_matrices(engine: Any, spec: DeepSpeed, world: World) -> None:
    """Let optimizers that step whole matrices do so on ZeRO's shards, a bucket of numbers at a time."""
    made, most = engine.basic_optimizer, int(spec.bucket_mb * 2**20 / 4)
    for one in getattr(made, "optimizers", [made]):
        if hasattr(one, "flat"):
            own = {id(group) for group in one.param_groups}
            cuts = [each for each in cuts_of(engine.optimizer, world) if id(made.param_groups[each[0]]) in own]
            one.flat = Matrices([(shard, cut) for _, shard, cut in cuts], world, most=most)
