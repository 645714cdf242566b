"""The exact quadratic of benchmarks/sfo.py against SGD that is really run, many times over."""

import math

import numpy as np
import pytest
from sfo_quadratic import EPOCH, Quadratic, play, standard
from sfo_results import Course, Minima

from distgrow import budget, constant
from distgrow.config.load import parse
from distgrow.core.noise_stats import Noise
from distgrow.core.progress import Progress
from distgrow.growth.controller import Controller

SMALL = Quadratic(
    curvature=np.array([1.0, 0.5, 0.1]), noise=np.array([0.6, 0.3, 0.1]), moments=np.array([1.0, 2.0, 5.0])
)
SCHEDULE = [(0.5, 2)] * 4 + [(0.9, 8)] * 3 + [(0.1, 1)] * 3 + [(1.5, 32)] * 2
RUNS = 200_000


def simulated() -> tuple[np.ndarray, list[np.ndarray]]:
    """θ of many runs of SGD after SCHEDULE, and every update's ⟨g_t, g_{t+1}⟩."""
    random = np.random.default_rng(0)
    theta = np.sqrt(SMALL.moments) * random.choice([-1.0, 1.0], (RUNS, 3))
    products, before = list[np.ndarray](), None
    for lr, batch in SCHEDULE:
        gradient = SMALL.curvature * theta + random.normal(size=(RUNS, 3)) * np.sqrt(SMALL.noise / batch)
        if before is not None:
            products.append((before * gradient).sum(1))
        theta, before = theta - lr * gradient, gradient
    return theta, products


def close(exact: float, samples: np.ndarray) -> bool:
    """Whether a mean of independent samples is what it should be, by five standard errors."""
    return abs(samples.mean() - exact) < 5 * samples.std() / math.sqrt(len(samples))


def test_moments_loss_gradient_and_products_are_those_of_sgd() -> None:
    theta, products = simulated()
    exact, expected = SMALL, list[float]()
    for lr, batch in SCHEDULE:
        expected.append(exact.next_product(lr, batch))
        exact = exact.after(lr, batch)
    assert all(close(moment, theta[:, i] ** 2) for i, moment in enumerate(exact.moments))
    assert close(exact.loss, (SMALL.curvature * theta**2).sum(1) / 2)
    assert close(exact.grad_sq, (SMALL.curvature * theta).__pow__(2).sum(1))
    assert all(close(product, samples) for product, samples in zip(expected, products, strict=False))


@pytest.mark.parametrize("lr", [0.1, 1.0, 2.0, 2.5])
def test_many_equal_updates_at_once_are_those_one_by_one(lr: float) -> None:
    one, along = SMALL, SMALL.along(lr, 4, 50)
    for moments in along:
        one = one.after(lr, 4)
        assert np.allclose(moments, one.moments, rtol=1e-10)


def test_measured_statistics_lead_noise_to_the_exact_ones() -> None:
    control = Controller(growth=constant(8), budget=budget(samples=8), epoch=100, max_micro=2)
    plan = control.plan(Progress())
    noise = Noise().after(plan.batch, plan.parts, 100, SMALL.measured(plan, 0.25))
    assert math.isclose(noise.grad_sq.value, SMALL.grad_sq, rel_tol=1e-9)
    assert math.isclose(noise.variance.value, SMALL.variance, rel_tol=1e-9)
    assert noise.product.value == 0.25


def course(values: dict, stop_at: float | None) -> tuple[Course, str]:
    """A config played on the standard problem."""
    seen = Course(grad_norm=Minima(targets=(0.2, 0.1)))
    ending = play(standard(), parse(values), EPOCH, seen, stop_at)
    return seen, ending


@pytest.mark.parametrize("stop_at", [None, 0.1])
@pytest.mark.parametrize("growth", [{"kind": "constant", "start": 32}, {"kind": "exponential", "start": 16, "cap": 64}])
def test_strides_tell_what_steps_tell(growth: dict, stop_at: float | None) -> None:
    values = {"growth": growth, "lr": {"base": 0.3}, "budget": {"epochs": 3.0}, "stages": {"every": {"epochs": 1.0}}}
    still = {"kind": "wsd", "decay": 0.0}  # a decay that never falls: played one by one
    strides, ended = course(values, stop_at)
    steps, also = course({**values, "lr": {"base": 0.3, "decay": still}}, stop_at)
    assert (ended, strides.steps, strides.sfo, strides.stretches) == (also, steps.steps, steps.sfo, steps.stretches)
    assert [(p[:2], pytest.approx(p[2])) for p in strides.grad_norm.points] == [
        (p[:2], p[2]) for p in steps.grad_norm.points
    ]
    assert strides.best == pytest.approx(steps.best)
    assert strides.last is not None and steps.last is not None
    assert strides.last.loss == pytest.approx(steps.last.loss)


def test_a_run_ends_at_the_update_that_arrives() -> None:
    seen, ending = course({"growth": {"kind": "constant", "start": 64}, "budget": {"epochs": 50.0}}, 0.1)
    assert ending == "arrived"
    problem = standard()
    for _ in range(seen.steps):
        assert math.sqrt(problem.grad_sq) > 0.1
        problem = problem.after(0.1, 64)
    assert math.sqrt(problem.grad_sq) <= 0.1 == pytest.approx(0.1)
    assert seen.sfo == 64 * seen.steps
