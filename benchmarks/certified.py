"""What growth by branches gives and costs, on digits: `python benchmarks/certified.py`.

A fifth of the labels are wrong. Every run ends with the same anneal of its learning rate, over the last fifth of its
samples, and may spend as many gradient evaluations as any other: certified growth pays for its branches, so it applies
fewer samples. Constant batches have the rate that lr.rule gives them.
"""

import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from paired import Report, arguments, keep, show
from sfo_tasks import mislabelled
from torch import Tensor, nn

from distgrow.core.budget import Budget
from distgrow.core.lr import LR, WSD, Linear, Sqrt
from distgrow.data.datasets import digits
from distgrow.growth.base import GrowthPolicy
from distgrow.growth.certified import Certified
from distgrow.growth.constant import Constant
from distgrow.optim import OptimizerSpec
from distgrow.optim.adamw import AdamW
from distgrow.optim.sgd import SGD
from distgrow.training.fit import fit
from distgrow.training.spec import RunSpec

SMALL, LARGE, WIDTH = 16, 256, 64
#: Share of the samples applied that branches may cost.
COST = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """A model, and how it is trained."""

    name: str
    hidden: bool  #: a hidden layer of WIDTH
    optimizer: OptimizerSpec
    lr: LR


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """What a run has reached."""

    setting: str
    schedule: str
    seed: int
    updates: int
    applied: int
    probe: int
    last_batch: int
    train: float
    test: float


def settings() -> list[Setting]:
    """Return what is trained."""
    anneal = WSD(decay=0.2)
    return [
        Setting(name="softmax, SGD", hidden=False, optimizer=SGD(), lr=LR(base=0.5, rule=Sqrt(), decay=anneal)),
        Setting(name="hidden layer, SGD, momentum .9", hidden=True, optimizer=SGD(momentum=0.9),
                lr=LR(base=0.02, rule=Sqrt(), decay=anneal)),
        Setting(name="hidden layer, AdamW", hidden=True, optimizer=AdamW(), lr=LR(base=0.002, rule=Sqrt(), decay=anneal)),
    ]


def cross_entropy(model: nn.Module, batch: Any) -> Tensor:
    """Return the mean loss over the rows."""
    return F.cross_entropy(model(batch[0]), batch[1])


def loss_on(model: nn.Module, rows: Any) -> float:
    """Return the mean loss over a whole set."""
    with torch.no_grad():
        return float(F.cross_entropy(model(rows.inputs), rows.labels))


def trained(setting: Setting, name: str, growth: GrowthPolicy, samples: int, seed: int, folder: Path) -> Ended:
    """Train once."""
    torch.manual_seed(seed)
    layers = [nn.Linear(64, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 10)] if setting.hidden else [nn.Linear(64, 10)]
    model = nn.Sequential(nn.Flatten(), *layers)
    train, test = (mislabelled(part, 0.2, number) for number, part in enumerate(digits()))
    lr = setting.lr
    if isinstance(growth, Constant):
        assert lr.rule is not None
        lr = lr.model_copy(update={"base": lr.base * lr.rule.factor_for(growth.start / SMALL)})
    result = fit(
        model, cross_entropy, train, growth=growth, lr=lr, optimizer=setting.optimizer,
        budget=Budget(samples=samples), run=RunSpec(dir=str(folder), seed=seed, log_every=10**6),
    )  # fmt: skip
    progress = result.progress
    return Ended(
        setting=setting.name, schedule=name, seed=seed, updates=progress.step, applied=progress.ledger.applied,
        probe=progress.ledger.probe, last_batch=growth.stage_batch(progress.stage), train=loss_on(model, train), test=loss_on(model, test),
    )


def runs(folder: Path, *, evaluations: int, seeds: int) -> Iterator[Ended]:
    """Train every setting by every schedule, all with as many evaluations."""
    schedules: dict[str, tuple[GrowthPolicy, int]] = {
        f"constant, {SMALL}": (Constant(start=SMALL), evaluations),
        f"constant, {LARGE}": (Constant(start=LARGE), evaluations),
    }
    for rates in ("scaled", "kept", "both"):
        growth = Certified(start=SMALL, cap=LARGE, rates=rates, cost=COST)
        schedules[f"certified, rates: {rates}"] = growth, int(evaluations / (1 + COST))
    for setting in settings():
        for seed in range(seeds):
            for name, (growth, samples) in schedules.items():
                yield trained(setting, name, growth, samples, seed, folder / f"{setting.name}-{seed}-{name}".replace(": ", " "))
