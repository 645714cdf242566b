"""The fit of the scaling law to what a run shows, and what it predicts of other courses, with an interval.

What one run cannot tell apart, such as L∞ and the loss that noise keeps up at constant η and b, is held by weak prior
beliefs. The interval therefore becomes wide where the run has not shown enough.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import least_squares

from distgrow.core.errors import ConfigError
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Beliefs:
    """Hold what is taken for likely before the fit: the mean and the standard deviation of each number's transform.

    They are log L∞; log of the fall still to come at the end, A·T^−s; log s; log of the settled noise at the largest η
    and first batch; logit(k − 1); log(u/η − 1), η the largest; and, if steps are normalised, log B.
    """

    means: Array
    errors: Array
    courses: Sequence[Course]  #: of the runs
    begins: Sequence[int]  #: the part of each course in which the first loss was seen
    lr: float  #: the largest
    batch: float  #: the first
    falls: bool  #: whether noise falls with the loss

    def law(self, numbers: Array) -> Law:
        """Return the law of transformed numbers."""
        floor, fall, power, settled, decay, unit = numbers[:6]
        balance = math.exp(numbers[6]) if len(numbers) > 6 else 0.0
        times = [course.normalised(balance).times for course in self.courses]
        end = max(float(own[-1]) for own in times)
        first = min(float(own[begin]) for own, begin in zip(times, self.begins, strict=True))
        power, unit = math.exp(power), self.lr * (1 + math.exp(unit))
        slow = 1 / (1 + math.exp(-decay))  # k − 1
        loss = math.exp(floor) + math.exp(fall) if self.falls else 1.0
        return Law(
            floor=math.exp(floor),
            scale=math.exp(fall) * end**power,
            power=power,
            noise=math.exp(settled) / loss * self.batch / self.lr * slow / unit,
            decay=1 + slow,
            unit=unit,
            falling=first if self.falls else None,
            balance=balance,
        )


def beliefs(seen: Sequence[Observed], momentum: float | None) -> Beliefs:
    """Return what is likely of runs.

    Args:
        seen: What they show. tr Σ tells how much noise keeps up, if the optimizer is SGD.
        momentum: Of SGD, whose steps are 1/(1 − momentum) as long. None: an optimizer that normalises its steps.
    """
    lr, batch = max(float(run.course.rates.max()) for run in seen), float(seen[0].course.batches[0])
    least = min(float(run.losses.min()) for run in seen)
    settled, error = 0.1 * least, 1.5
    variances = [run.variance for run in seen if run.variance is not None]
    if variances and momentum is not None:
        settled, error = removable_loss(lr / (1 - momentum), float(np.median(variances)), batch), 0.25
    means = [math.log(0.2 * least), math.log(0.3 * least), math.log(0.6), math.log(settled), 0.0, math.log(10)]
    errors = [1.5, 1.5, 0.6, error, 0.4, 0.5]
    if momentum is None:
        means, errors = [*means, math.log(4 * batch)], [*errors, 1.5]
    return Beliefs(
        means=np.array(means),
        errors=np.array(errors),
        courses=[run.course for run in seen],
        begins=[int(np.argmax(run.over.any(axis=0))) for run in seen],
        lr=lr,
        batch=batch,
        falls=momentum is not None and seen[0].evaluated,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """Hold the law that fits runs, and how sure that is."""

    law: Law
    error: float  #: root mean square of the residuals over the last halves of the runs, without the losses' own errors
    draws: Sequence[Law]  #: laws that fit about as well
    ends: Array  #: (runs,): the law's losses where the runs stand
    drawn: Array  #: (draws, runs): the same of the draws

    @property
    def end(self) -> float:
        """Return the law's loss where the first run stands."""
        return float(self.ends[0])

    def predict(self, course: Course) -> tuple[float, float, float]:
        """Return the loss at a course's end, and the ends of its interval of 90 %.

        The interval is that of the change against the nearest of the recorded ends, which have been seen. It does not
        go below 0 if the losses do not.

        Raises:
            ConfigError: The course is so far from what was recorded that the law's numbers overflow.
        """
        with np.errstate(all="ignore"):
            loss, others = float(self.law.loss(course)[0]), np.array([law.loss(course)[0] for law in self.draws])
        if not (math.isfinite(loss) and np.isfinite(others).all()):
            raise ConfigError("the law that fits the run has no loss for it, as it trains for too short a time Σ η")
        near = int(np.argmin(np.abs(self.ends - loss)))
        drawn = self.ends[near] + others - self.drawn[:, near]
        error = math.hypot(self.error, MISFIT * loss, CHANGE * (loss - self.ends[near]))
        low, high = np.quantile(drawn + np.random.default_rng(SEED).normal(0, error, len(drawn)), [0.05, 0.95])
        return loss, max(float(low), min(0.0, loss, float(self.ends[near]))), float(high)


def fit(seen: Sequence[Observed], momentum: float | None = 0.0) -> Fit:
    """Fit the law to one or more runs by least squares from several beginnings; for `momentum` see beliefs.

    Raises:
        ConfigError: No law fits them.
    """
    try:
        with np.errstate(all="ignore"):
            return _fit(seen, beliefs(seen, momentum))
    except (ArithmeticError, ValueError) as error:  # LinAlgError is a ValueError
        raise ConfigError(
            f"no law fits the losses, which lie between {min(float(run.losses.min()) for run in seen):.4g} and "
            f"{max(float(run.losses.max()) for run in seen):.4g} ({error}); give a run that has trained further, "
            "several runs, or another --metric"
        ) from None


def _fit(seen: Sequence[Observed], prior: Beliefs) -> Fit:
    """Return the best of the fits from several beginnings. Errors are those of numpy and scipy."""
    errors = [np.hypot(run.errors, MISFIT * run.losses) for run in seen]

    def residuals(numbers: Array) -> Array:
        law = _law(prior, numbers)  # none at a step that is too long, which the solver then shortens
        left = [np.full(len(run.losses), np.inf) if law is None else told(law, run) - run.losses for run in seen]
        return np.concatenate([*map(np.divide, left, errors), (numbers - prior.means) / prior.errors])

    begins = [prior.means + moved(len(prior.means), *shift) for shift in ((-0.6, 0), (0.6, -1), (0.6, 1))]
    found = min((least_squares(residuals, begin) for begin in begins), key=lambda each: each.cost)
    left, numbers, slopes = found.fun, found.x, found.jac
    count = len(left) - len(numbers)
    inflation = max(1.0, float(np.sum(left[:count] ** 2)) / max(1, count - len(numbers)))
    slopes[:count] /= math.sqrt(inflation)
    covariance = np.linalg.inv(slopes.T @ slopes)
    drawn = np.random.default_rng(SEED).multivariate_normal(numbers, WIDER**2 * covariance, DRAWS, method="eigh")
    law, draws = prior.law(numbers), [each for each in (_law(prior, own) for own in drawn) if each is not None]
    if not draws:
        raise OverflowError("they do not tell how large its numbers are")
    late = [((told(law, run) - run.losses) ** 2 - run.errors**2)[run.late] for run in seen]
    return Fit(
        law=law,
        error=math.sqrt(max(0.0, float(np.mean(np.concatenate(late))))),
        draws=draws,
        ends=np.array([law.loss(run.course)[0] for run in seen]),
        drawn=np.array([[each.loss(run.course)[0] for run in seen] for each in draws]),
    )


def _law(prior: Beliefs, numbers: Array) -> Law | None:
    """Return the law of transformed numbers. None: they are so large that it has no losses of the runs."""
    try:
        law = prior.law(numbers)
        losses = [law.loss(course)[0] for course in prior.courses]
    except (ArithmeticError, ValueError):
        return None
    return law if np.isfinite(losses).all() else None


def told(law: Law, run: Observed) -> Array:
    """Return the law's losses in place of a run's."""
    return run.over @ law.loss(run.course, range(len(run.course.updates)))


def moved(count: int, power: float, unit: float) -> Array:
    """Return how far a beginning of the fit is from the prior means: in log s and in log(u/η − 1)."""
    shift = np.zeros(count)
    shift[[2, 5]] = power, unit
    return shift
