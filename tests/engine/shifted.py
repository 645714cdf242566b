"""What the tests of extrapolation share: kinds, small runs and engines of one update."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tiny import data, loss
from torch import Tensor, nn

from distgrow import (
    SGD,
    Extrapolate,
    RunSpec,
    Torch,
    budget,
    every,
    exponential,
    fit,
    sqrt_lr,
)
from distgrow.core.plan import Plan
from distgrow.engine.extrapolated import ExtrapolatingEngine
from distgrow.engine.torch import TorchEngine
from distgrow.optim import OptimizerSpec

KINDS: dict[str, dict[str, Any]] = {
    "past": {"kind": "past"},
    "fresh": {"kind": "fresh"},
    "noise": {"kind": "noise"},
    "fresh in groups": {"kind": "fresh", "local": True, "group": 4},
    "noise in groups": {"kind": "noise", "local": True, "group": 4},
}
DOUBLE = Torch(precision="float64", max_micro=4)


def values(model: nn.Module) -> list[Tensor]:
    return [value.detach().clone() for value in model.state_dict().values()]


def same(found: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def close(found: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.allclose(a, b, rtol=1e-11, atol=1e-14) for a, b in zip(found, expected, strict=True))


def lively() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.3), nn.Linear(4, 2)).double()


def run(folder: Path, model: nn.Module, **more: Any) -> Any:
    settings: dict[str, Any] = {
        "growth": exponential(4, 2, 16), "stages": every(samples=40), "lr": sqrt_lr(0.05), "engine": DOUBLE,
        "budget": budget(samples=160), "run": RunSpec(dir=str(folder)), **more,
    }  # fmt: skip
    return fit(model, settings.pop("loss", loss), settings.pop("train", data()), **settings)


def lines(folder: Path, kind: str = "step") -> list[dict[str, Any]]:
    found = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line for line in found if line["event"] == kind]


def engine_of(model: nn.Module, function: Any, spec: Extrapolate | None, optimizer: OptimizerSpec | None = None) -> Any:
    settings: dict[str, Any] = {"spec": Torch(precision="float64"), "optimizer": optimizer or SGD()}
    if spec is None:
        return TorchEngine(model, function, **settings)
    return ExtrapolatingEngine(model, function, extrapolate=spec, **settings)


def one(start: float = 1.0) -> nn.Module:
    model = nn.Linear(1, 1, bias=False).double()
    nn.init.constant_(model.weight, start)
    return model


ROW = (torch.zeros(1, 1, dtype=torch.float64), torch.zeros(1))


def of_weight(function: Callable[[Tensor], Tensor]) -> Any:
    """Return a loss that is a function of the parameter alone."""
    return lambda model, batch: function(next(model.parameters())).sum() + 0 * batch[0].sum()


def walk(
    spec: Extrapolate | None, function: Any, lr: float, updates: int, model: nn.Module | None = None
) -> list[float]:
    """Return the parameter after each update."""
    model = model or one()
    engine, found = engine_of(model, of_weight(function), spec), list[float]()
    for k in range(updates):
        engine.update(Plan(batch=1, world=1, micro=1, accum=1, lr=lr, stage=0, seed=k), [ROW])
        found.append(next(model.parameters()).flatten()[0].item())
    return found
