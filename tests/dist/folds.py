"""A rank of test_folds.py: several runs in one script, in groups of fit()'s own or in one that the script makes."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import TensorDataset

from distgrow import RunSpec, budget, constant, constant_lr, fit

ROWS = TensorDataset(torch.randn(24, 3, generator=torch.Generator().manual_seed(0)), torch.arange(24) % 2)


def loss(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def main(folder: Path, whose: str) -> None:
    if whose == "script":
        dist.init_process_group("gloo")
    for fold in range(3):
        torch.manual_seed(0)
        model = nn.Linear(3, 2)
        settings = {"growth": constant(8), "lr": constant_lr(0.1), "budget": budget(epochs=1)}
        fit(model, loss, ROWS, **settings, run=RunSpec(dir=str(folder / f"fold-{fold}")))
        parameters = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
        torch.save(parameters, folder / f"{fold}.{dist.get_rank() if dist.is_initialized() else 0}.pt")
    if whose == "script":
        dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
