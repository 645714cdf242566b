"""A rank of test_traffic.py: bytes that a rank sends in an update, by each sharding and number of micro-batches."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from sharding import Block
from torch import Tensor, nn

from distgrow.core.plan import Plan
from distgrow.distributed.world import joined
from distgrow.engine.fsdp.spec import FSDP
from distgrow.launch.local import leave
from distgrow.optim.adamw import AdamW

SHARDINGS: dict[str, dict[str, Any]] = {
    "full": {},
    "full, every": {"reduce": "every"},
    "grad_op": {"shard": "grad_op"},
    "hybrid": {"shard": "hybrid", "replicas": 2},
    "half": {"shard": "grad_op", "precision": "bfloat16"},
}
ACCUM = (1, 3)


def network() -> nn.Sequential:
    """Blocks of a width that four ranks divide, between layers that are in no unit."""
    return nn.Sequential(nn.Linear(8, 32), nn.Sequential(*(Block(32) for _ in range(4))), nn.Linear(32, 8))


def loss(model: nn.Module, batch: Any) -> Tensor:
    return model(batch).square().mean()


#: The collectives, how many of their first tensors are looked at, and how often a ring sends the largest. torch 2.13
#: has other names for two than before.
GATHER, SCATTER = "all_gather_single", "reduce_scatter_single"
if not hasattr(dist, GATHER):
    GATHER, SCATTER = "all_gather_into_tensor", "reduce_scatter_tensor"
COLLECTIVES = {GATHER: (2, 1), SCATTER: (2, 1), "all_reduce": (1, 2)}


@contextmanager
def counted() -> Iterator[dict[str, float]]:
    """Count the bytes that this rank sends by collectives, as a ring sends them."""
    sent = {"bytes": 0.0}
    kept = {name: getattr(dist, name) for name in COLLECTIVES}

    def count(name: str) -> Any:
        first, times = COLLECTIVES[name]

        def call(*args: Any, **kwargs: Any) -> Any:
            given = (*args, *kwargs.values())
            ranks = dist.get_world_size(next((v for v in given if isinstance(v, dist.ProcessGroup)), None))
            tensors = [value for value in given if isinstance(value, Tensor)][:first]
            whole = max(tensor.numel() * tensor.element_size() for tensor in tensors)
            sent["bytes"] += times * whole * (ranks - 1) / ranks
            return kept[name](*args, **kwargs)

        return call

    for name in kept:
        setattr(dist, name, count(name))
    try:
        yield sent
    finally:
        for name, function in kept.items():
            setattr(dist, name, function)


def main(file: Path) -> None:
    """Each sharding's second update, so that nothing of the first is counted."""
    found: dict[str, float] = {}
    with joined("cpu", alone=True) as world:
        for name, keys in SHARDINGS.items():
            for accum in ACCUM:
                engine = FSDP(**keys).build(network(), loss, metrics=None, optimizer=AdamW(clip=1.0), world=world)
                plan = Plan(batch=2 * accum * world.size, world=world.size, micro=2, accum=accum, lr=0.1, stage=0)
                rows = [torch.randn(2, 8) for _ in range(accum)]
                engine.update(plan, rows)
                with counted() as sent:
                    engine.update(plan, rows)
                found[f"{name} {accum}"] = sent["bytes"]
        if world.rank == 0:
            file.write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    leave()
