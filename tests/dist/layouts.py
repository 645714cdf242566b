"""A rank of test_layouts.py: models of uncommon make; the last writes the parameters that each run gives back."""

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from distgrow import RunSpec, budget, constant, constant_lr, fit
from distgrow.distributed.world import World, joined
from distgrow.engine.spec import EngineSpec, Torch
from distgrow.launch.local import leave

ROWS = TensorDataset(torch.randn(24, 6, generator=torch.Generator().manual_seed(0)), torch.arange(24) % 2)


class Complex(nn.Module):
    """A complex filter before a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.out = nn.Parameter(torch.randn(4, dtype=torch.cfloat)), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.fft.irfft(torch.fft.rfft(x) * self.weight, n=6))


class Branched(nn.Module):
    """A layer for all rows, another for rare ones alone: without such a row it takes no part."""

    def __init__(self) -> None:
        super().__init__()
        self.all, self.rare = nn.Linear(6, 2), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        out, rare = self.all(x), x[:, 0] > 1
        return torch.where(rare[:, None], self.rare(x), out) if rare.any() else out


CASES: dict[str, tuple[Callable[[], nn.Module], EngineSpec]] = {
    "complex": (Complex, Torch(precision="float64", max_micro=2)),
    "find_unused": (Branched, Torch(precision="float64", max_micro=2, find_unused=True)),
}


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def trained(case: str, folder: Path, world: World) -> nn.Module:
    """The model that a run of four passes gives back."""
    make, engine = CASES[case]
    torch.manual_seed(0)
    model = make()
    fit(
        model, loss, ROWS, growth=constant(4), lr=constant_lr(0.1), budget=budget(epochs=4), engine=engine,
        world=world, run=RunSpec(dir=str(folder)),
    )  # fmt: skip
    return model


def main(folder: Path, cases: list[str]) -> None:
    """Train all cases, one after the other, in one process group."""
    with joined("cpu", alone=True) as world:
        for case in cases:
            model = trained(case, folder / case, world)
            if world.rank == world.size - 1:
                torch.save([parameter.detach() for parameter in model.parameters()], folder / f"{case}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
    leave()
