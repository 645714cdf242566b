"""A task that stops at a gate: the digits, whose updates wait at one of them until a file is there."""

import os
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from distgrow.data.datasets import digits


def make(gate: str, call: int = 20, pause_s: float = 0.05) -> Any:
    """The model, its loss and the data; a rank's `call`-th loss writes its pid to `gate`.RANK and waits for `gate`."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    calls = 0

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        nonlocal calls
        calls += model.training  # the check of the loss before a run is in eval mode
        time.sleep(pause_s)
        if calls == call:
            Path(f"{gate}.{os.environ.get('RANK', '0')}").write_text(str(os.getpid()))
        while calls == call and not Path(gate).exists():
            time.sleep(0.05)
        return F.cross_entropy(model(batch[0]), batch[1])

    train, test = digits()
    return model, loss, train, test
