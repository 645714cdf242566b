"""A quadratic on which E f and E‖∇f‖² of SGD are known exactly, under any schedule: no sampling noise.

f(θ) = ½ Σ h_i θ_i², and one sample's gradient noise has the covariance diag(c) in the same directions. Of the second
moments m_i = E θ_i² an update of b samples at η makes (1 − ηh_i)²·m_i + η²c_i/b. Schedules are the real Controller's,
and those that measure are told the exact statistics.
"""

import math
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray
from sfo_results import Course, Reading

from distgrow.config.run import Run
from distgrow.core.noise_stats import Measured, Measuring
from distgrow.core.plan import Plan
from distgrow.core.progress import Outcome, Progress
from distgrow.growth.base import Measure
from distgrow.growth.controller import Controller

Array = NDArray[np.float64]
CHUNK = 4096  #: updates computed at once
NEVER = 2**62  #: updates between two measurements of a schedule that asks for none
TOO_FAR = 1e6  #: ‖∇f‖ of a run that diverges


@dataclass(frozen=True, slots=True, kw_only=True)
class Quadratic:
    """The problem and how far SGD has come on it."""

    curvature: Array  #: h, the Hessian's eigenvalues
    noise: Array  #: c, variance of one sample's gradient along each
    moments: Array  #: m = E θ²
    variance: float = field(init=False)  #: tr Σ

    def __post_init__(self) -> None:
        object.__setattr__(self, "variance", float(self.noise.sum()))

    @property
    def loss(self) -> float:
        """E f."""
        return float(self.curvature @ self.moments) / 2

    @property
    def grad_sq(self) -> float:
        """E ‖∇f‖²."""
        return float(self.curvature**2 @ self.moments)

    def after(self, lr: float, batch: int) -> "Quadratic":
        """One update on."""
        return replace(self, moments=(1 - lr * self.curvature) ** 2 * self.moments + lr**2 / batch * self.noise)

    def along(self, lr: float, batch: int, updates: int) -> Array:
        """The moments after each of `updates` equal updates, (updates, directions), in closed form."""
        kept = (1 - lr * self.curvature) ** 2
        powers = kept ** np.arange(1, updates + 1)[:, None]
        with np.errstate(invalid="ignore", divide="ignore"):
            sums = np.where(kept == 1, np.arange(1, updates + 1)[:, None], (1 - powers) / (1 - kept))
        return powers * self.moments + sums * (lr**2 / batch * self.noise)

    def next_product(self, lr: float, batch: int) -> float:
        """E⟨g_t, g_{t+1}⟩ of the update to come and the one after it: the progress test's product."""
        h = self.curvature
        return float(h**2 * (1 - lr * h) @ self.moments - lr / batch * (h @ self.noise))

    def measured(self, plan: Plan, product: float) -> Measured:
        """What an engine would find, free of noise."""
        parts_sq, batch_sq = (self.grad_sq + self.variance / size for size in (plan.batch / plan.parts, plan.batch))
        return Measured(parts_sq=parts_sq, batch_sq=batch_sq, product=product)


def standard() -> Quadratic:
    """64 directions of curvature 1 … 1/100, noise in proportion to curvature with tr Σ = 1, f(θ₀) = 1 spread evenly."""
    curvature = np.logspace(0, -2, 64)
    return Quadratic(curvature=curvature, noise=curvature / curvature.sum(), moments=2 / curvature / 64)


def reading(problem: Quadratic) -> Reading:
    """There is nothing to hold out."""
    return Reading(grad_norm=math.sqrt(problem.grad_sq), loss=problem.loss)


def play(problem: Quadratic, run: Run, epoch: int, course: Course, stop_at: float | None) -> str:
    """SGD on the run's schedule, until the budget is spent or ‖∇f‖ has come down to `stop_at`; how it ended."""
    controller = Controller(
        growth=run.growth,
        stages=run.stages,
        lr=run.lr,
        budget=run.budget,
        epoch=epoch,
        max_micro=epoch,
        measuring=Measuring(every=1 if Measure.NOISE in run.growth.needs else NEVER, window=run.run.noise.window),
    )
    if run.growth.adaptive or run.lr.decay.kind != "none":
        return _step_by_step(problem, controller, course, stop_at)
    return _in_strides(problem, controller, course, stop_at)


def _step_by_step(problem: Quadratic, controller: Controller, course: Course, stop_at: float | None) -> str:
    progress, product = Progress(), math.nan
    while not controller.done(progress):
        if controller.probe_due(progress):
            progress = controller.after_probe(progress, math.sqrt(problem.grad_sq), controller.epoch)
        progress = controller.advance(progress)
        plan = controller.plan(progress)
        norm = math.sqrt(problem.grad_sq + problem.variance / plan.batch)
        found = problem.measured(plan, product) if plan.window or plan.product else Measured()
        product = problem.next_product(plan.lr, plan.batch) if plan.product else math.nan
        progress = controller.after(progress, plan, Outcome(loss=problem.loss, grad_norm=norm, measured=found))
        problem = problem.after(plan.lr, plan.batch)
        course.updated(plan.batch)
        course.read(progress.ledger.total, reading(problem))
        if course.reached(stop_at):
            return "arrived"
        if not norm < TOO_FAR:
            return "diverged"
    return "done"


def _in_strides(problem: Quadratic, controller: Controller, course: Course, stop_at: float | None) -> str:
    """The same for schedules that neither measure nor decay: whole stretches of equal updates in closed form."""
    for stride in controller.forecast():
        left = stride.updates
        while left:
            moments = problem.along(stride.plan.lr, stride.plan.batch, min(left, CHUNK))
            ending = _read_all(problem, course, moments, stride.plan.batch, stop_at)
            if ending is not None:
                return ending
            problem, left = replace(problem, moments=moments[-1]), left - len(moments)
    return "done"


def _read_all(problem: Quadratic, course: Course, moments: Array, batch: int, stop_at: float | None) -> str | None:
    """Read the moments after each of some equal updates, where they are news; how the run ended, if it did."""
    norms = np.sqrt(moments @ problem.curvature**2)
    losses = moments @ problem.curvature / 2
    arrived = np.flatnonzero(norms <= (stop_at or 0.0))
    last = int(arrived[0]) if len(arrived) else len(norms) - 1
    done, sfo = 0, course.sfo
    for at, norm in enumerate(norms[: last + 1].tolist()):
        if at == last or course.grad_norm.news(norm):
            course.updated(batch, at + 1 - done)
            done = at + 1
            course.read(sfo + done * batch, reading(replace(problem, moments=moments[at])))
        course.grad_norm.lowest = min(course.grad_norm.lowest, norm)
    for name, values in (("grad_norm", norms), ("loss", losses)):
        course.best[name] = min(course.best[name], float(values[: last + 1].min()))
    if len(arrived):
        return "arrived"
    return None if norms[-1] < TOO_FAR else "diverged"


EPOCH = 1024  #: samples that stand for one pass over a training set


def play_standard(run: Run, seed: int, course: Course, stop_at: float | None) -> tuple[int, str]:
    """`play` on the standard problem: samples of an epoch, and how the run ended."""
    return EPOCH, play(standard(), run, EPOCH, course, stop_at)
