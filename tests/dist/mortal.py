"""A task whose worker can be made to die once, by name: the digits, with a loss that looks for its death."""

import os
import signal
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from distgrow.datasets import digits


def make(rank: int = 1, call: int = 20, mark: str = "died") -> Any:
    """The model, its loss and the data; `rank` kills itself in the forward pass of its loss' `call`-th call, once."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    calls = 0

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == call and int(os.environ["RANK"]) == rank and not Path(mark).exists():
            Path(mark).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return F.cross_entropy(model(batch[0]), batch[1])

    train, test = digits()
    return model, loss, train, test
