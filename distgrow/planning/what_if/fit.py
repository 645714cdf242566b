"""The fit of the scaling law to what a run shows, and what it predicts of other courses, with an interval.

What one run cannot tell apart, such as L∞ and the loss that noise keeps up at constant η and b, is held by weak prior
beliefs. The interval therefore becomes wide where the run has not shown enough.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from distgrow.planning.what_if.observed import Observed
from distgrow.report.log import Array
from distgrow.theory.noise import removable_loss
from distgrow.theory.scaling_law import Course, Law

#: Relative error of the law itself that every loss is taken to have beside its own.
MISFIT = 0.003
#: Relative error of a predicted change of the loss, against the recorded end: the law is none of the net at hand.
CHANGE = 0.25
#: Factor of the fitted numbers' errors, as the law bends within them.
WIDER = 1.4
#: Draws of the fitted numbers for an interval, and the seed that makes it the same every time.
DRAWS, SEED = 200, 0
#: Steps of the fit, at most.
MOST = 150


@dataclass(frozen=True, slots=True, kw_only=True)
class Beliefs:
    """Hold what is taken for likely before the fit: the mean and the standard deviation of each number's transform.

    They are log L∞; log of the fall still to come at the run's end, A·T^−s; log s; log of the settled noise at the
    run's largest η and first batch; logit(k − 1); log(u/η − 1), η the largest.
    """

    means: Array
    errors: Array
    time: float  #: T at the run's end
    lr: float  #: the largest
    batch: float  #: the first

    def law(self, numbers: Array) -> Law:
        """Return the law of transformed numbers."""
        floor, fall, power, settled, decay, unit = numbers
        power, unit = math.exp(power), self.lr * (1 + math.exp(unit))
        slow = 1 / (1 + math.exp(-decay))  # k − 1
        return Law(
            floor=math.exp(floor),
            scale=math.exp(fall) * self.time**power,
            power=power,
            noise=math.exp(settled) * self.batch / self.lr * slow / unit,
            decay=1 + slow,
            unit=unit,
        )


def beliefs(seen: Observed, momentum: float | None) -> Beliefs:
    """Return what is likely of a run.

    Args:
        seen: What it shows. tr Σ tells how much noise keeps up, if the optimizer is SGD.
        momentum: Of SGD, whose steps are 1/(1 − momentum) as long. None: another optimizer.
    """
    lr, batch, least = float(seen.course.rates.max()), float(seen.course.batches[0]), float(seen.losses.min())
    settled, error = 0.1 * least, 1.5
    if seen.variance is not None and momentum is not None:
        settled, error = removable_loss(lr / (1 - momentum), seen.variance, batch), 0.5
    means = [math.log(0.5 * least), math.log(0.3 * least), math.log(0.6), math.log(settled), 0.0, math.log(10)]
    return Beliefs(
        means=np.array(means),
        errors=np.array([1.0, 1.5, 0.6, error, 1.0, 1.0]),
        time=float(seen.course.times[-1]),
        lr=lr,
        batch=batch,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """Hold the law that fits a run, and how sure that is."""

    law: Law
    end: float  #: the law's loss where the run stands
    error: float  #: root mean square of the residuals over the last half of the losses, without their own errors
    draws: Sequence[Law]  #: laws that fit about as well
    ends: Array  #: their losses where the run stands

    def predict(self, course: Course) -> tuple[float, float, float]:
        """Return the loss at a course's end, and the ends of its interval of 90 %.

        The interval is that of the change against the recorded end, which has been seen. It does not go below 0 if the
        losses do not.
        """
        loss = float(self.law.loss(course)[0])
        drawn = self.end + np.array([law.loss(course)[0] for law in self.draws]) - self.ends
        error = math.hypot(self.error, CHANGE * (loss - self.end))
        low, high = np.quantile(drawn + np.random.default_rng(SEED).normal(0, error, len(drawn)), [0.05, 0.95])
        return loss, max(float(low), min(0.0, loss, self.end)), float(high)


def fit(seen: Observed, momentum: float | None = 0.0) -> Fit:
    """Fit the law to a run by least squares from several beginnings; for `momentum` see beliefs."""
    prior = beliefs(seen, momentum)
    errors = np.hypot(seen.errors, MISFIT * seen.losses)

    def residuals(numbers: Array) -> Array:
        law = prior.law(numbers)
        losses = law.loss(seen.course, seen.ends)
        return np.concatenate([(losses - seen.losses) / errors, (numbers - prior.means) / prior.errors])

    begins = [prior.means + np.array([0, 0, power, 0, 0, unit]) for power, unit in ((-0.6, 0), (0.6, -1), (0.6, 1))]
    found = min((least_squares(residuals, begin) for begin in begins), key=lambda each: float(np.sum(each[0] ** 2)))
    left, numbers, slopes = found
    count = len(seen.losses)
    inflation = max(1.0, float(np.sum(left[:count] ** 2)) / max(1, count - len(numbers)))
    slopes = slopes.copy()
    slopes[:count] /= math.sqrt(inflation)
    covariance = np.linalg.inv(slopes.T @ slopes)
    drawn = np.random.default_rng(SEED).multivariate_normal(numbers, WIDER**2 * covariance, DRAWS, method="eigh")
    late = (left[:count] * errors)[count // 2 :] ** 2 - seen.errors[count // 2 :] ** 2
    law, draws = prior.law(numbers), [prior.law(each) for each in drawn]
    return Fit(
        law=law,
        end=float(law.loss(seen.course)[0]),
        error=math.sqrt(max(0.0, float(np.mean(late)))),
        draws=draws,
        ends=np.array([each.loss(seen.course)[0] for each in draws]),
    )


def least_squares(residuals: Callable[[Array], Array], begin: Array) -> tuple[Array, Array, Array]:
    """Return the residuals, the numbers and the slopes where Σ residuals² is least near `begin`.

    Source: Levenberg and Marquardt; slopes are differences.
    """
    numbers, left, damping = begin, residuals(begin), 1e-2
    for _ in range(MOST):
        slopes = _slopes(residuals, numbers, left)
        normal, gradient = slopes.T @ slopes, slopes.T @ left
        step = np.linalg.solve(normal + damping * np.diag(np.diag(normal)), -gradient)
        ahead = residuals(numbers + np.clip(step, -1.0, 1.0))
        gained = float(np.sum(left**2) - np.sum(ahead**2))
        if gained > 0:
            numbers, left, damping = numbers + np.clip(step, -1.0, 1.0), ahead, damping / 5
        else:
            damping *= 5
        if 0 < gained < 1e-7 * np.sum(left**2) + 1e-10 or damping > 1e10:
            break
    return left, numbers, _slopes(residuals, numbers, left)


def _slopes(residuals: Callable[[Array], Array], numbers: Array, left: Array, width: float = 1e-5) -> Array:
    steps = np.eye(len(numbers)) * width
    return np.stack([(residuals(numbers + step) - left) / width for step in steps], axis=1)
