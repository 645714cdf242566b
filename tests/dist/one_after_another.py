"""Runs one after another in the same processes: each must end as the first of its engine does."""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from distgrow import LR, AdamW, RunSpec, budget, constant, fit
from distgrow.engine import FSDP, DeepSpeed, EngineSpec, Torch

ENGINES: list[EngineSpec] = [
    *(DeepSpeed(zero=zero, device="cpu") for zero in (1, 2, 3)),
    FSDP(wrap=["Linear"], device="cpu"),
    Torch(device="cpu"),
]


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def trained(engine: EngineSpec, folder: Path) -> Tensor:
    """Return the parameters that a run leaves."""
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(64, 8), torch.randint(3, (64,)))
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
    result = fit(
        model, loss, data, growth=constant(8), budget=budget(epochs=1), optimizer=AdamW(), lr=LR(base=0.01),
        engine=engine, run=RunSpec(dir=str(folder)),
    )  # fmt: skip
    assert result.finished
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def main() -> None:
    folder = Path(sys.argv[1])
    ends = [trained(engine, folder / str(k)) for k, engine in enumerate([*ENGINES, *ENGINES])]
    for first, again in zip(ends[: len(ENGINES)], ends[len(ENGINES) :], strict=True):
        assert torch.equal(first, again)


if __name__ == "__main__":
    main()
