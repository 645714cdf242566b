"""A network in double precision, its loss and its rows, on which steps are compared to the last bits."""

from typing import Any

import torch
from torch import Tensor, nn


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def loss(model: nn.Module, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def data(rows: int = 64) -> list[tuple[Tensor, int]]:
    numbers = torch.Generator().manual_seed(1)
    return [(torch.randn(3, generator=numbers, dtype=torch.float64), k % 2) for k in range(rows)]
