"""A rank of test_measuring.py: the same measured updates by every engine; rank 0 writes what each has measured."""

import sys
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distgrow.core.plan import Plan
from distgrow.data.datasets import digits
from distgrow.distributed.world import World, joined
from distgrow.engine.fsdp.spec import FSDP
from distgrow.engine.spec import DeepSpeed, EngineSpec, Torch
from distgrow.launch.local import leave
from distgrow.optim import Optimizer
from distgrow.optim.adamw import AdamW
from distgrow.optim.muon import Muon
from distgrow.optim.sgd import SGD

BATCHES = (22, 22, 17)
OPTIMIZERS: list[Optimizer] = [
    SGD(weight_decay=0.1, clip=0.5),
    SGD(momentum=0.9, nesterov=True, weight_decay=0.1, clip=0.5),
    Muon(clip=0.5, ns_precision="float32"),
    AdamW(beta2=0.95, clip=0.5),
]
ENGINES: dict[str, EngineSpec] = {
    "torch": Torch(device="cpu"),
    "zero 1": DeepSpeed(zero=1),
    "zero 2": DeepSpeed(zero=2),
    "zero 3": DeepSpeed(zero=3),
    "full": FSDP(),
    "grad_op": FSDP(shard="grad_op"),
    "every": FSDP(reduce="every"),
    "hybrid": FSDP(shard="hybrid", replicas=2),
    "full, bfloat16": FSDP(precision="bfloat16"),
    "zero 2, offload": DeepSpeed(zero=2, offload_optimizer=True),
    "zero 1, bfloat16": DeepSpeed(zero=1, precision="bfloat16"),
    "zero 3, bfloat16": DeepSpeed(zero=3, precision="bfloat16"),
}


def loss(model: nn.Module, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]).float(), batch[1])


def plans(world: int) -> list[Plan]:
    """Three updates of three micro-batches on every rank, of unequal rows."""
    shape = {"world": world, "accum": 3, "lr": 0.1, "stage": 0, "window": 100, "product": True}
    return [Plan(batch=batch, micro=-(-batch // world // 3), **shape) for batch in BATCHES]


def rows(plan: Plan, rank: int) -> list[tuple[Tensor, Tensor]]:
    """A rank's micro-batches: another place in the data for every batch size."""
    data, _ = digits()
    return [
        (data.inputs[part.start : part.stop], data.labels[part.start : part.stop])
        for part in plan.rows(plan.batch, rank)
    ]


def measured(
    spec: EngineSpec, optimizer: Optimizer, world: World, *, preconditioned: bool = False
) -> list[tuple[float, ...]]:
    """What the updates have shown: the parts' and the batch's squares and the product."""
    engine = spec.build(network(), loss, metrics=None, optimizer=optimizer, world=world)
    updates = [replace(plan, preconditioned=preconditioned) for plan in plans(world.size)]
    return [astuple(engine.update(plan, rows(plan, world.rank)).measured) for plan in updates]


def alone(optimizer: Optimizer, world: int, *, preconditioned: bool = False) -> list[tuple[float, ...]]:
    """The same parts, all in one process."""
    engine = ENGINES["torch"].build(network(), loss, metrics=None, optimizer=optimizer, world=World())
    found = []
    for plan in [replace(plan, preconditioned=preconditioned) for plan in plans(world)]:
        parts = [part for rank in range(world) for part in rows(plan, rank)]
        found.append(astuple(engine.update(replace(plan, world=1, accum=len(parts)), parts).measured))
    return found


def network() -> nn.Module:
    """Parameters with odd numbers of elements, which shards have to be padded for."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 33), nn.Tanh(), nn.Linear(33, 10))


def main(file: Path, engines: list[str]) -> None:
    """All engines and optimizers, one after the other, in one process group; tensors (optimizer, update, 3)."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills memory that nobody has written to with NaN
    with joined("cpu", alone=True) as world:
        found = {"alone": torch.tensor([alone(optimizer, world.size) for optimizer in OPTIMIZERS])}
        for name in engines:
            found[name] = torch.tensor([measured(ENGINES[name], optimizer, world) for optimizer in OPTIMIZERS])
            assert all(torch.equal(found[name].nan_to_num(), other.nan_to_num()) for other in world.gather(found[name]))
        adam, given = OPTIMIZERS[-1], {"preconditioned": True}
        found["alone, preconditioned"] = torch.tensor(alone(adam, world.size, **given))
        found["preconditioned"] = torch.tensor(measured(ENGINES["torch"], adam, world, **given))
        if world.rank == 0:
            torch.save(found, file)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
    leave()
