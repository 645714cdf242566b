"""Outcomes that show what a test says they do, and runs made of them."""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np

from distgrow.core.noise_stats import Measured, Noise
from distgrow.core.plan import Plan
from distgrow.core.progress import Outcome, Progress
from distgrow.growth.controller import Controller


def shown(
    plan: Plan, grad_sq: float = math.nan, variance: float = math.nan, product: float = math.nan, loss: float = 1.0
) -> Outcome:
    """An applied update from whose parts |∇f|² and tr Σ are estimated to be exactly these."""
    parts_sq = grad_sq + variance * plan.parts / plan.batch
    measured = Measured(parts_sq=parts_sq, batch_sq=grad_sq + variance / plan.batch, product=product)
    return Outcome(loss=loss, measured=measured)


def steady(grad_sq: float, variance: float) -> Noise:
    """Means without spread, after a hundred updates of a stage."""
    noise = Noise(fresh=100)
    for _ in range(100):
        noise = replace(noise, grad_sq=noise.grad_sq.add(grad_sq, 1), variance=noise.variance.add(variance, 1))
    return noise


def walk(
    control: Controller, outcome: Callable[[Progress, Plan], Outcome], begin: Progress | None = None
) -> Iterator[tuple[Progress, Plan]]:
    """A run, update by update, as the training loop takes it, with what `outcome` says of each."""
    progress = begin or Progress()
    while not control.done(progress):
        progress = control.advance(progress)
        plan = control.plan(progress)
        yield progress, plan
        progress = control.after(progress, plan, outcome(progress, plan))


def probed_walk(control: Controller, norm: Callable[[Progress], float]) -> Iterator[tuple[Progress, Plan]]:
    """The same where ‖∇f‖ is measured exactly as often as the growth asks, at one evaluation a time."""
    progress = Progress()
    while not control.done(progress):
        if control.probe_due(progress):
            progress = control.after_probe(progress, norm(progress), 1)
        progress = control.advance(progress)
        plan = control.plan(progress)
        yield progress, plan
        progress = control.after(progress, plan, Outcome())


class Quadratic:
    """SGD on (h/2)|θ|² with noise of trace `variance` in each sample's gradient; numpy, exact products."""

    def __init__(self, h: float, variance: float, distance: float, seed: int, dimensions: int = 50) -> None:
        self.h, self.root = h, math.sqrt(variance / dimensions)
        self.theta = np.full(dimensions, distance / math.sqrt(dimensions))
        self.random, self.last = np.random.default_rng(seed), None

    def __call__(self, progress: Progress, plan: Plan) -> Outcome:
        """One update as `plan` says, and what it shows."""
        full = self.h * self.theta
        parts = full + self.random.normal(size=(2, full.size)) * self.root / math.sqrt(plan.batch / 2)
        gradient = parts.mean(0)
        product = math.nan if self.last is None else float(gradient @ self.last)
        self.theta, self.last = self.theta - plan.lr * gradient, gradient
        noise = float(((parts - gradient) ** 2).sum()) / 2  # of the mean of the two parts: tr Σ/b, without bias
        return shown(plan, float((gradient**2).sum()) - noise, noise * plan.batch, product)
