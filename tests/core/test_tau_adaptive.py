"""The policy's batch against the closed form, a search of every batch, and a problem of known best batch."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from measurements import steady

from distgrow import (
    SGD,
    ConfigError,
    RunSpec,
    budget,
    constant_lr,
    fit,
    nice_sampling,
    stratified_sampling,
    tau_adaptive,
)
from distgrow.core.endless import ENDLESS
from distgrow.core.noise_stats import Mean, Measuring
from distgrow.core.progress import Progress
from distgrow.core.stages import MinStage
from distgrow.growth.controller import Controller
from distgrow.growth.tau_adaptive import TauAdaptive
from distgrow.theory.finite_sum import FiniteSum
from distgrow.theory.samplings import Nice, cheapest_batch

CONSTANTS = {"smoothness": 1.0, "largest_smoothness": 4.0, "mu": 0.5, "epsilon": 0.1}


def control(growth: TauAdaptive, n: int, **more: Any) -> Controller:
    return Controller(growth=growth, lr=constant_lr(0.1), budget=budget(samples=10**6), epoch=n, max_micro=2, **more)


def at(variance: float, grad_sq: float = 1.0) -> Progress:
    """A stage that has been long enough, with means that have settled."""
    return Progress(
        step=200, samples=3200, stage_samples=10**9, stage_step=200, noise=steady(grad_sq, variance)
    )  # fmt: skip


@given(
    st.integers(16, 3000), st.floats(0.01, 10), st.floats(0, 0.5), st.floats(0.01, 1), st.floats(0.001, 10),
    st.floats(0.001, 1000), st.floats(-5, 5),
)  # fmt: skip
def test_the_stage_is_that_of_the_closed_form_and_of_the_search(
    n: int, smoothness: float, share: float, mu: float, epsilon: float, variance: float, grad_sq: float
) -> None:
    largest = smoothness * (1 + share * (n - 1))
    growth = TauAdaptive(
        start=2, cap=n, stages_at_once=40, hysteresis=1.0, confidence=0.0, smoothness=smoothness,
        largest_smoothness=largest, mu=mu, epsilon=epsilon,
    )  # fmt: skip
    optimum_sq = variance * (n - 1) / n
    kappa = 2 * optimum_sq / (epsilon * mu)
    closed = n * (kappa - (largest - smoothness)) / (kappa + n * smoothness - largest) if kappa > largest else 1.0
    exact = math.log2(closed / 2)
    assume(abs(exact % 1 - 0.5) > 1e-6)
    stage = control(growth, n, needs=frozenset()).advance(at(variance, grad_sq)).stage
    assert stage == min(max(0, math.floor(exact + 0.5)), growth.cap_stage)
    problem = FiniteSum(
        samples=n, smoothness=smoothness, largest_smoothness=largest, mu=mu, optimum_sq=optimum_sq
    )  # fmt: skip
    if n <= 300:
        searched = cheapest_batch(Nice(problem), mu=mu, epsilon=epsilon)
        assert abs(searched - closed) <= 1 + 1e-6 * n


def test_the_lower_end_of_the_variance_decides_and_the_gradient_does_not() -> None:
    spread = Mean()
    for k in range(100):
        spread = spread.add(8.0 * (1.9 if k % 2 else 0.1), 1.0)
    between = spread.value - spread.error / 2
    optimum_sq = between * 999 / 1000
    best = FiniteSum(
        samples=1000, smoothness=1, largest_smoothness=4, mu=0.5, optimum_sq=optimum_sq
    ).best_batch(0.1)  # fmt: skip
    below = math.floor(math.log2(best / 2) - 0.5)  # the edge above this stage is moved to `best` by the hysteresis
    hysteresis = best / (2 * 2 ** (below + 0.5))
    for confidence, stage in [(1.0, below), (0.0, below + 1)]:
        growth = TauAdaptive(
            start=2, cap=512, confidence=confidence, hysteresis=hysteresis, stages_at_once=20, **CONSTANTS
        )
        for grad_sq in (1.0, 1e9, -1.0):
            progress = at(8.0, grad_sq)
            progress = replace(progress, noise=replace(progress.noise, variance=spread))
            assert control(growth, 1000).advance(progress).stage == stage


def test_the_batch_never_falls_and_does_not_move_without_noise() -> None:
    growth = TauAdaptive(start=2, cap=512, **CONSTANTS)
    assert control(growth, 1000).advance(replace(at(1e-9), stage=3)).stage == 3
    assert control(growth, 1000).advance(at(0.0)).stage == 0


class Centres(torch.utils.data.Dataset[torch.Tensor]):
    """The points c_i of f_i = ½‖θ − c_i‖²: L = L_max = μ = 1, and h̄ is their variance."""

    def __init__(self) -> None:
        self.rows = torch.from_numpy(np.random.default_rng(3).normal(size=(500, 20)))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.rows[index]


class Point(torch.nn.Module):
    """θ."""

    def __init__(self) -> None:
        super().__init__()
        self.theta = torch.nn.Parameter(torch.full((20,), 3.0, dtype=torch.double))


def test_on_squares_around_points_a_run_ends_at_the_stage_next_to_the_best_batch(tmp_path: Path) -> None:
    data, ends = Centres(), set[int]()
    optimum_sq = float(((data.rows - data.rows.mean(0)) ** 2).sum(1).mean())
    epsilon = 1.7  # τ* is about 23, in the middle of a stage of 16 … 32 by logarithms
    problem = FiniteSum(samples=500, smoothness=1, largest_smoothness=1, mu=1, optimum_sq=optimum_sq)
    best = cheapest_batch(Nice(problem), mu=1, epsilon=epsilon)
    start = round(best / 8)
    growth = tau_adaptive(
        start, 64 * start, smoothness=1, largest_smoothness=1, mu=1, epsilon=epsilon, confidence=0,
        min_stage=MinStage(updates=20),
    )  # fmt: skip
    for sampling in (None, nice_sampling()):
        result = fit(
            Point(), lambda model, batch: 0.5 * ((model.theta - batch) ** 2).sum(1).mean(), data, growth=growth,
            lr=constant_lr(0.02), budget=budget(samples=6000), sampling=sampling, optimizer=SGD(),
            run=RunSpec(dir=str(tmp_path / f"{sampling is None}"), noise=Measuring(every=1)),
        )  # fmt: skip
        ends.add(result.progress.stage)
    assert best / growth.stage_batch(3) == pytest.approx(1, abs=0.2)
    assert ends == {3}


@pytest.mark.parametrize(
    ("change", "epoch", "more", "why"),
    [
        ({"largest_smoothness": 0.5}, 100, {}, r"100 samples: largest_smoothness=0\.5 must lie between"),
        ({"largest_smoothness": 500.0}, 100, {}, "largest_smoothness=500.0 must lie between"),
        ({}, ENDLESS, {}, "a stream"),
        ({"cap": None}, 100, {}, "set growth.cap"),
        ({}, 100, {"sampling": stratified_sampling(2)}, "growth.kind=tau_adaptive measures noise"),
    ],
)
def test_what_cannot_be_is_refused(change: dict[str, Any], epoch: int, more: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        control(TauAdaptive(**{"start": 2, "cap": 64, **CONSTANTS, **change}), epoch, **more).check()
