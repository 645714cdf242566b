"""A rank of test_parameter_noise_ranks.py: three measured updates; every rank writes the noise of each parameter."""

import sys

import torch
from torch import Tensor, nn

from distgrow import SGD, Torch
from distgrow.core.plan import Plan
from distgrow.distributed.world import World, joined
from distgrow.engine.torch import TorchEngine
from distgrow.launch.local import leave

BATCH, PARTS = 24, 6
ROWS = torch.randn(3 * BATCH, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def loss(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).square().sum(1).mean()


def figures(world: World) -> Tensor:
    """Return the noise of each parameter after the updates, whose parts are the same on every world."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2))
    engine = TorchEngine(
        model, loss, spec=Torch(precision="float64", device="cpu"), optimizer=SGD(clip=0.5), world=world
    )
    for start in range(0, len(ROWS), BATCH):
        plan = Plan(
            batch=BATCH, world=world.size, micro=BATCH // PARTS, accum=PARTS // world.size, lr=0.1, stage=0, window=20,
            by_parameter=True,
        )  # fmt: skip
        engine.update(plan, [ROWS[part.start : part.stop] for part in plan.rows(start, world.rank)])
    return torch.tensor(list(engine.parameter_noise().values()), dtype=torch.float64)


if __name__ == "__main__":
    with joined("cpu", alone=True) as ranks:
        torch.save(figures(ranks), f"{sys.argv[1]}-{ranks.rank}.pt")
    leave()
