"""A rank of test_extrapolated_ranks.py: a run whose gradients are evaluated at shifted points, with growth."""

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distgrow import SGD, AdamW, Extrapolate, RunSpec, Torch, budget, every, exponential, fit, sqrt_lr
from distgrow.checkpoint.spec import Checkpointing
from distgrow.distributed.world import World, joined
from distgrow.launch.local import leave

ROWS = [(row, k % 3) for k, row in enumerate(torch.randn(160, 6, generator=torch.Generator().manual_seed(3)))]
KINDS: dict[str, Extrapolate] = {
    "past": Extrapolate(kind="past", rate=0.3),
    "fresh": Extrapolate(kind="fresh", rate=0.3),
    "noise": Extrapolate(kind="noise", rate=0.3),
    "fresh-groups": Extrapolate(kind="fresh", rate=0.3, local=True, group=4),
    "noise-groups": Extrapolate(kind="noise", rate=0.3, local=True, group=4),
}


def loss(model: nn.Module, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def trained(folder: Path, world: World, kind: str, *, resume: bool = False) -> Tensor:
    """Return all parameters after the run, flat."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    optimizer = AdamW(clip=0.5) if kind == "past" else SGD(momentum=0.9, clip=0.5)
    fit(
        model, loss, ROWS, growth=exponential(8, 2, 32), stages=every(samples=80), lr=sqrt_lr(0.05),
        budget=budget(samples=320), optimizer=optimizer, extrapolate=KINDS[kind],
        engine=Torch(precision="float64", max_micro=4), world=world, resume=resume,
        run=RunSpec(dir=str(folder), checkpoint=Checkpointing(every_steps=4, keep=99)),
    )  # fmt: skip
    return torch.cat([parameter.detach().flatten().clone() for parameter in model.parameters()])


if __name__ == "__main__":
    with joined("cpu", alone=True) as ranks:
        for name in KINDS:
            place = f"{sys.argv[1]}-{name}"
            torch.save(trained(Path(place), ranks, name, resume="resume" in sys.argv), f"{place}-{ranks.rank}.pt")
    leave()
