"""A rank of test_own_past_ranks.py: updates at points that each rank's own past gradient shifts, and runs of them."""

import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distgrow import SGD, AdamW, Extrapolate, RunSpec, Torch, budget, every, exponential, fit, sqrt_lr
from distgrow.checkpoint.spec import Checkpointing
from distgrow.core.plan import Plan, split
from distgrow.distributed.world import World, joined
from distgrow.engine.extrapolated import ExtrapolatingEngine
from distgrow.launch.local import leave
from distgrow.optim import OptimizerSpec

ROWS = [(row, k % 3) for k, row in enumerate(torch.randn(160, 6, generator=torch.Generator().manual_seed(3)).double())]
BATCHES = [8, 8, 7, 8, 13, 4, 16, 9]
OPTIMIZERS: dict[str, OptimizerSpec] = {
    "sgd": SGD(momentum=0.9, clip=0.3),
    "adamw": AdamW(clip=0.3),
    "unclipped": SGD(weight_decay=0.01),
    "items": SGD(momentum=0.9, clip=0.3),
}
LOCAL = Extrapolate(kind="past", rate=0.4, local=True)


def loss(model: nn.Module, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def positive(model: nn.Module, batch: Any) -> Tensor:
    """A mean over rows whose label is not 0: those are the items."""
    return nn.functional.cross_entropy(model(batch[0]), batch[1].masked_fill(batch[1] == 0, -100))


def count(batch: Any) -> int:
    return int((batch[1] != 0).sum())


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def collated(rows: Any) -> tuple[Tensor, Tensor]:
    return torch.stack([row for row, _ in rows]), torch.tensor([label for _, label in rows])


def flat(model: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten().clone() for parameter in model.parameters()])


def plans(lr: float = 0.1) -> list[tuple[int, Plan]]:
    """The first row of each update, and its plan on two ranks."""
    edges = [sum(BATCHES[:k]) for k in range(len(BATCHES) + 1)]
    found = list[tuple[int, Plan]]()
    for first, end in pairwise(edges):
        micro, accum = split(end - first, 2, 2)
        found.append((first, Plan(batch=end - first, world=2, micro=micro, accum=accum, lr=lr, stage=0, seed=first)))
    return found


def updated(world: World, name: str, spec: Extrapolate, lr: float = 0.1) -> list[Tensor]:
    """The parameters after each update."""
    model, found = network(), list[Tensor]()
    engine = ExtrapolatingEngine(
        model, positive if name == "items" else loss, extrapolate=spec, spec=Torch(precision="float64"),
        optimizer=OPTIMIZERS[name], world=world, items=count if name == "items" else None,
    )  # fmt: skip
    for first, plan in plans(lr):
        engine.update(plan, [collated([ROWS[k] for k in rows]) for rows in plan.rows(first, world.rank)])
        found.append(flat(model))
    return found


def trained(folder: Path, world: World, spec: Extrapolate | None, *, resume: bool = False) -> Tensor:
    """The parameters after a run with growth."""
    model = network()
    fit(
        model, loss, ROWS, growth=exponential(8, 2, 32), stages=every(samples=80), lr=sqrt_lr(0.05),
        budget=budget(samples=320), optimizer=SGD(momentum=0.9, clip=0.5), extrapolate=spec,
        engine=Torch(precision="float64", max_micro=4), world=world, resume=resume,
        run=RunSpec(dir=str(folder), checkpoint=Checkpointing(every_steps=4, keep=99)),
    )  # fmt: skip
    return flat(model)


RUNS = {"local": LOCAL, "zero": LOCAL.model_copy(update={"rate": 0.0}), "plain": None}

if __name__ == "__main__":
    with joined("cpu", alone=True) as ranks:
        kept: dict[str, Any] = {}
        if "resume" in sys.argv:
            kept["local"] = trained(Path(sys.argv[1]) / "local", ranks, LOCAL, resume=True)
        else:
            kept |= {name: updated(ranks, name, LOCAL) for name in OPTIMIZERS}
            kept["still"] = updated(ranks, "sgd", LOCAL, lr=0.0)
            kept |= {name: trained(Path(sys.argv[1]) / name, ranks, spec) for name, spec in RUNS.items()}
        torch.save(kept, f"{sys.argv[1]}/kept-{ranks.rank}.pt")
    leave()
