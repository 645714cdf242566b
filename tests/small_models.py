"""Models in double precision that tests in several folders train."""

import torch
from torch import Tensor, nn


def line() -> nn.Module:
    """Return a linear model of three numbers."""
    torch.manual_seed(0)
    return nn.Linear(3, 2).double()


class Drawing(nn.Module):
    """A network with buffers and random numbers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 2)).double()

    def forward(self, rows: Tensor) -> Tensor:
        return self.layers(rows)
