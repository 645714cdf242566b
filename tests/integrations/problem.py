"""What the tests of other trainers train: five stages of ragged batches, and what fit() comes to on them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from conftest import events
from torch import Tensor, nn

from distgrow import SGD, Controller, Order, Progress, RunSpec, Torch, budget, every, exponential, fit, sqrt_lr

ROWS, MICRO, MOMENTUM = 203, 6, 0.9
SCHEDULE: dict[str, Any] = {
    "growth": exponential(start=5, factor=2.0, cap=43),
    "stages": every(samples=150),
    "lr": sqrt_lr(0.05),
    "budget": budget(samples=900),
}


class Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Two classes, float64."""

    def __init__(self) -> None:
        self.x = torch.randn(ROWS, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"x": self.x[index], "labels": (self.x[index].sum() > 0).long()}


class Poisoned(Rows):
    """Samples at some positions of the stream are not numbers."""

    def __init__(self, *positions: int) -> None:
        super().__init__()
        self.x[torch.from_numpy(Order(n=ROWS)(list(positions))[1])] = torch.nan


class Network(nn.Module):
    """As a model of Transformers is called: rows and labels in, loss and logits out."""

    def __init__(self, dropout: float = 0.1) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layers = nn.Sequential(nn.Linear(10, 16), nn.Tanh(), nn.Dropout(dropout), nn.Linear(16, 2)).double()

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.layers(x)
        if labels is None:
            return {"logits": logits}
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def controller(**changes: Any) -> Controller:
    """The schedule, for somebody else's loop."""
    return Controller(**{"epoch": ROWS, "max_micro": MICRO, **SCHEDULE, **changes})


def loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    return model(**batch)["loss"]


def fitted(folder: Path, dropout: float = 0.1) -> tuple[Tensor, Progress, list[float]]:
    """What fit() comes to: parameters, progress and the learning rate of each update."""
    model, optimizer = Network(dropout), SGD(momentum=MOMENTUM)
    engine = Torch(max_micro=MICRO, precision="float64", device="cpu")
    result = fit(model, loss, Rows(), optimizer=optimizer, engine=engine, run=RunSpec(dir=str(folder)), **SCHEDULE)
    return flat(model), result.progress, [event["lr"] for event in events(folder, "step")]


def flat(model: Any) -> Tensor:
    """All parameters, one after the other."""
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def close(one: Tensor, other: Tensor) -> None:
    """Equal but for the order of float64 sums."""
    torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-13)
