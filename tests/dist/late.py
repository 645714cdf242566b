"""A rank of test_delayed_ranks.py: a run whose gradients are applied late, with growth, accumulation and an average."""

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distgrow import SGD, RunSpec, Torch, budget, ema, every, exponential, fit, load_weights, sqrt_lr
from distgrow.checkpoint.spec import Checkpointing
from distgrow.distributed.world import World, joined
from distgrow.launch.local import leave

ROWS = [(row, k % 3) for k, row in enumerate(torch.randn(160, 6, generator=torch.Generator().manual_seed(3)))]
DELAY = 3


def loss(model: nn.Module, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def trained(folder: Path, world: World, *, resume: bool = False) -> Tensor:
    """Return all parameters after the run and their average, flat."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    fit(
        model, loss, ROWS, growth=exponential(6, 2, 40), stages=every(epochs=0.7), lr=sqrt_lr(0.05),
        budget=budget(samples=500), optimizer=SGD(momentum=0.9, clip=0.5), average=ema(samples=100),
        engine=Torch(precision="float64", max_micro=5, delay=DELAY), world=world, resume=resume,
        run=RunSpec(dir=str(folder), checkpoint=Checkpointing(every_steps=4, keep=99)),
    )  # fmt: skip
    parameters = [parameter.detach().flatten().clone() for parameter in model.parameters()]
    load_weights(model, folder, average=True)
    return torch.cat([*parameters, *(parameter.detach().flatten() for parameter in model.parameters())])


if __name__ == "__main__":
    with joined("cpu", alone=True) as ranks:
        torch.save(trained(Path(sys.argv[1]), ranks, resume="resume" in sys.argv), f"{sys.argv[1]}-{ranks.rank}.pt")
    leave()
