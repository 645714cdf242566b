"""Certified growth on noisy least squares, whose expected losses are known at every batch: it grows where they say.

Rows are standard normal in D dimensions, labels have noise of variance 1. With e = E‖w − w*‖² the loss is ½(e + 1), and
an update at η of b rows makes of e: ((1 − η)² + η²(D + 1)/b)·e + η²D/b, exactly.
"""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distgrow.core.budget import Budget
from distgrow.core.lr import LR, constant_lr, linear_lr
from distgrow.engine.spec import Torch
from distgrow.growth.certified import Certified
from distgrow.training.fit import fit
from distgrow.training.spec import RunSpec

D, ROWS = 10, 40_000


class Rows:
    """Rows and labels; every row is seen once."""

    def __init__(self, seed: int) -> None:
        draw = torch.Generator().manual_seed(seed)
        self.x = torch.randn(ROWS, D, generator=draw, dtype=torch.float64)
        self.y = torch.randn(ROWS, generator=draw, dtype=torch.float64)  # w* = 0

    def __len__(self) -> int:
        return ROWS

    def __getitems__(self, indices: list[int]) -> Any:
        return [(self.x[index], self.y[index]) for index in indices]

    def __getitem__(self, index: int) -> Any:
        return self.x[index], self.y[index]


def half_square(model: nn.Module, batch: Any) -> Tensor:
    return (model(batch[0]).squeeze(-1) - batch[1]).square().mean() / 2


def branches_of(
    growth: Certified, lr: LR, *, first: float, samples: int, seed: int, folder: Path
) -> list[dict[str, Any]]:
    """The tests of a run that begins at ‖w − w*‖² = `first`."""
    model = nn.Linear(D, 1, bias=False).double()
    with torch.no_grad():
        model.weight.fill_(math.sqrt(first / D))
    run = RunSpec(dir=str(folder / f"{seed}"), seed=seed, log_every=10**6)
    budget, engine = Budget(samples=samples), Torch(precision="float64", max_micro=512)
    fit(model, half_square, Rows(seed), growth=growth, lr=lr, budget=budget, engine=engine, run=run)
    lines = map(json.loads, (folder / f"{seed}/metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["event"] == "branches"]


def after(e: float, eta: float, batch: int, updates: int) -> tuple[float, list[float]]:
    """Return e after so many updates, and the expected loss of each."""
    losses: list[float] = []
    for _ in range(updates):
        losses.append((e + 1) / 2)
        e = ((1 - eta) ** 2 + eta**2 * (D + 1) / batch) * e + eta**2 * D / batch
    return e, losses


def expected(growth: Certified, e: float, eta: float, other_eta: float, batch: int, samples: int) -> float:
    """Return the expected difference of a branch at twice the batch to one at `batch`, from e on."""
    means: list[float] = []
    for rate, size in ((eta, batch), (other_eta, 2 * batch)):
        losses = after(e, rate, size, samples // size)[1]
        skipped = len(losses) * growth.skip // growth.windows
        means.append(math.fsum(losses[skipped:]) / len(losses[skipped:]))
    return means[1] - means[0]


def stationary(eta: float, batch: int) -> float:
    """Return the fixed point of e."""
    return eta * D / (batch * (2 - eta * (1 + (D + 1) / batch)))


@pytest.mark.parametrize("seed", range(2))
def test_with_a_rate_in_proportion_it_grows_up_to_the_critical_batch_and_no_further(seed: int, tmp_path: Path) -> None:
    """η = b/80: from b = 64 to 128 it comes near the limit of stability, 2/(1 + (D + 1)/b), and the floor rises."""
    growth = Certified(start=4, cap=512, cost=0.5, samples=2048, tolerance=0.05)
    gaps = {
        batch: expected(growth, stationary(batch / 80, batch), batch / 80, batch / 40, batch, 2048)
        for batch in (4, 8, 16, 32, 64)
    }
    critical = min(batch for batch, gap in gaps.items() if gap > growth.tolerance)
    assert critical == 64
    assert max(gap for batch, gap in gaps.items() if batch < critical) < growth.tolerance / 2
    tests = branches_of(growth, linear_lr(4 / 80), first=0.5, samples=36_000, seed=seed, folder=tmp_path)
    won = [test["batch"] for test in tests]
    assert won[:3] == [8, 16, 32]
    assert max(won) == won[-1] == critical
    assert won.count(critical) > 1  # 128 was tried, and was worse


@pytest.mark.parametrize("seed", range(2))
def test_at_a_kept_rate_it_waits_until_noise_outweighs_the_descent(seed: int, tmp_path: Path) -> None:
    """While the loss falls, half as many steps at the same rate are worse; at the floor of noise they are better."""
    growth = Certified(start=4, cap=8, cost=0.5, samples=256, tolerance=0, rates="kept", confidence=1)
    eta = 0.005
    tests = branches_of(growth, constant_lr(eta), first=10, samples=8_000, seed=seed, folder=tmp_path)
    errors = {test["samples"]: after(10, eta, 4, test["samples"] // 4)[0] for test in tests}
    gaps = {samples: expected(growth, e, eta, eta, 4, 256) for samples, e in errors.items()}
    won = [test["samples"] for test in tests if test["winner"]]
    assert list(gaps.values()) == sorted(gaps.values(), reverse=True)
    assert sum(gap > 0.005 for gap in gaps.values()) >= 2
    assert won
    assert all(gaps[samples] < 0.005 for samples in won)
