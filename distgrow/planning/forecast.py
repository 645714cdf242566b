"""Forecast of a run: its stages, updates and gradient evaluations, as numbers."""

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Annotated, Any

import numpy as np
from pydantic import BeforeValidator, ConfigDict, ValidationError

from distgrow.config.run import Theory
from distgrow.core.budget import Budget
from distgrow.core.extrapolate import Extrapolate
from distgrow.core.lr import LR
from distgrow.core.progress import Progress
from distgrow.core.spec import Spec
from distgrow.core.stages import Stages
from distgrow.core.yaml_text import plain, read_text
from distgrow.growth import Growth
from distgrow.growth.base import with_rule
from distgrow.growth.controller import Controller
from distgrow.growth.schedule import Schedule
from distgrow.optim import Optimizer, OptimizerSpec
from distgrow.optim.own import Given
from distgrow.optim.sgd import SGD
from distgrow.report.planned import Forecast, Planned, Target
from distgrow.report.runs import Record
from distgrow.theory import extrapolation, sgd, staleness

#: Relative difference up to which predictions take η as constant.
EVEN = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """Hold one stage of a run."""

    stage: int
    batch: int
    first_sample: int
    first_step: int
    samples: int
    steps: int

    def progress(self, step: int) -> Progress:
        """Return the progress after `step` updates of this stage."""
        before = Progress(stage=self.stage).repeat(self.first_sample, 1)
        return replace(before, step=self.first_step).repeat(self.batch, step)


#: Titles of the two tables of adaptive growth, and whether its stages begin as soon as they may.
BOUNDS = (
    ("at slowest: every stage as late as it may begin", False),
    ("at fastest: every stage as soon as it may begin", True),
)


def stages(controller: Controller, *, soonest: bool = False) -> Iterator[Stage]:
    """Yield every stage of the run. A shortened last update is part of the last stage."""
    sample = step = 0
    outline = controller.outline(Progress(), soonest=soonest)
    ahead = next(outline, None)
    while ahead is not None:
        stage, batch, steps = ahead
        samples = batch * steps
        ahead = next(outline, None)
        while ahead is not None and ahead[0] == stage:
            samples, steps = samples + ahead[1] * ahead[2], steps + ahead[2]
            ahead = next(outline, None)
        yield Stage(stage=stage, batch=batch, first_sample=sample, first_step=step, samples=samples, steps=steps)
        sample, step = sample + samples, step + steps


# ── predictions from the constants of the theory ─────────────────────────────────────────────────────────


def turns(controller: Controller, stage: Stage) -> list[int]:
    """Return the updates between which η only rises or only falls: a stage's first, the end of a warm-up, its last."""
    last, batch = stage.steps - 1, stage.batch
    warm, span = controller.lr.decay.warm, controller.span
    end = bisect_left(range(last), 1.0, key=lambda step: warm(stage.progress(step).ledger.applied, batch, span))
    return sorted({0, end, last})


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """Hold the learning rate from which on training is known to be unstable."""

    lr: float
    formula: str
    delay: int = 0  #: updates by which gradients are applied late
    shift: str = ""  #: kind of the shift of the points where gradients are evaluated


def stability_limit(
    theory: Theory | None, optimizer: OptimizerSpec, delay: int, extrapolate: Extrapolate | None = None
) -> Limit | None:
    """Return the limit of the learning rate, or None if it is not known: L is not, or not for this optimizer."""
    if theory is None:
        return None
    if extrapolate is not None:
        return _shifted_limit(theory.smoothness, extrapolate) if optimizer.plain_sgd else None
    if optimizer.plain_sgd:
        formula = "2 sin(π/(4τ + 2))/L" if delay else "2/L"
        return Limit(lr=staleness.stability_limit(delay) / theory.smoothness, formula=formula, delay=delay)
    if not (delay and isinstance(optimizer, SGD)) or optimizer.nesterov or optimizer.at_growth.changes:
        return None
    limit = staleness.momentum_stability_limit(delay, optimizer.momentum) / theory.smoothness
    return Limit(lr=limit, formula=f"momentum_stability_limit({delay}, {optimizer.momentum:g})/L", delay=delay)


def _shifted_limit(smoothness: float, extrapolate: Extrapolate) -> Limit | None:
    """Return the limit of plain SGD whose gradients are evaluated at shifted points, None with random shifts."""
    rate, kind = extrapolate.rate, extrapolate.kind
    if kind == "past":
        return Limit(lr=extrapolation.past_stability_limit(rate, smoothness), formula="2/L - 2·rate", shift=kind)
    if kind == "fresh":
        formula = f"fresh_stability_limit({rate:g}, {smoothness:g})"
        return Limit(lr=extrapolation.fresh_stability_limit(rate, smoothness), formula=formula, shift=kind)
    return None


def unstable(limit: Limit | None, controller: Controller, stage: Stage) -> list[str]:
    """Return the problem that a stage's learning rate reaches the limit, if it does and the limit is known."""
    if limit is None:
        return []
    highest = max(controller.rate(stage.progress(step), stage.batch) for step in turns(controller, stage))
    lr = controller.growth.highest_rate(controller.lr, stage.stage, highest)
    if lr < limit.lr:
        return []
    can = "" if lr == highest else ", by what may be measured,"
    reached = f"lr={lr:.4g} of stage {stage.stage}{can} reaches {limit.formula}={limit.lr:.4g}"
    if limit.delay:
        return [f"{reached}, the limit at engine.delay={limit.delay}; lower lr.base, growth.cap or engine.delay"]
    if limit.shift:
        return [
            f"{reached}, the limit of extrapolate.kind={limit.shift}; lower lr.base, growth.cap or extrapolate.rate"
        ]
    return [f"{reached}; lower lr.base or growth.cap"]


def sfo_to_target(
    constants: sgd.Constants, controller: Controller, epsilon: float, *, soonest: bool = False
) -> int | None:
    """Return the SFO after the update at which the bound is first at most ε², or None if the budget ends before."""
    runs = [run for stage in stages(controller, soonest=soonest) for run in even(controller, stage)]
    reached = np.flatnonzero(sgd.bounds(constants, runs) <= epsilon**2)
    if not len(reached):
        return None
    before, (updates, lr, batch) = runs[: reached[0]], runs[reached[0]]

    def there(count: int) -> bool:
        return sgd.bound(constants, [*before, (count, lr, batch)]) <= epsilon**2

    count = 1 + bisect_left(range(1, updates), True, key=there)
    return sum(updates * batch for updates, _, batch in before) + count * batch


def even(controller: Controller, stage: Stage) -> Iterator[tuple[int, float, int]]:
    """Yield a stage as parts (updates, lr, batch), in order. Within a part η differs by EVEN at most."""
    cuts = [*(turns(controller, stage)[:-1] or [0]), stage.steps]
    ahead = list(pairwise(cuts))[::-1]
    while ahead:
        low, high = ahead.pop()
        one, other = (controller.rate(stage.progress(step), stage.batch) for step in (low, high - 1))
        if abs(one - other) <= EVEN * max(one, other) or high - low == 1:
            yield high - low, (one + other) / 2, stage.batch
        else:
            middle = (low + high) // 2
            ahead += [(middle, high), (low, middle)]


def _named(optimizer: Any) -> Any:
    """Return torch's SGD, which a script has built, as a config names it; any other optimizer as it is."""
    if not isinstance(optimizer, dict) or (optimizer.get("kind"), optimizer.get("of")) != ("given", "SGD"):
        return optimizer
    settings = optimizer.get("settings", {})
    first = settings.get("groups", {}).get("0", {})
    return {"kind": "sgd", "momentum": first.get("momentum", settings.get("momentum", 0.0))}


class Recorded(Spec):
    """Hold the keys of a config that decide batches, and those that predictions need.

    The task is not checked, and a run of fit() records none.
    """

    model_config = ConfigDict(extra="ignore")

    growth: Growth
    stages: Stages
    lr: LR
    budget: Budget
    optimizer: Annotated[Optimizer | Given, BeforeValidator(_named)] = SGD()
    engine: dict[str, Any] = {}
    theory: Theory | None = None
    task: Any = None


def foresee(record: Record) -> Planned | None:
    """Return the plan of a run, as if no update were skipped, or None if this version cannot read its config.yaml."""
    try:
        recorded = Recorded.model_validate(plain(read_text(record.config, "config.yaml")))
        lr = with_rule(recorded.growth, recorded.lr, recorded.optimizer.growth_rule)
        schedule = Schedule(growth=recorded.growth, stages=recorded.stages, lr=lr, budget=recorded.budget)
        controller = schedule.controller(round(record.epoch))
        late = recorded.engine.get("delay") or recorded.engine.get("kind") == "async"
        predicted = recorded.optimizer.plain_sgd and not late
        return _planned(controller, recorded.theory if predicted else None)
    except (ValidationError, ValueError, OverflowError, RecursionError):
        return None


def _planned(controller: Controller, theory: Theory | None) -> Planned:
    adaptive = controller.growth.adaptive
    bounds = (False, True) if adaptive else (False,)
    forecasts = tuple(_forecast(controller, soonest) for soonest in bounds)
    ends = {} if adaptive else {stage.stage: stage.first_sample + stage.samples for stage in stages(controller)}
    return Planned(forecasts=forecasts, after=ends, target=_target(controller, theory, bounds))


def _forecast(controller: Controller, soonest: bool) -> Forecast:
    parts = list(controller.outline(Progress(), soonest=soonest))
    return Forecast(
        sfo=sum(batch * updates for _, batch, updates in parts),
        updates=sum(updates for _, _, updates in parts),
        last=max(stage for stage, _, _ in parts),
        batch=max(batch for _, batch, _ in parts),
    )


def _target(controller: Controller, theory: Theory | None, bounds: tuple[bool, ...]) -> Target | None:
    """Return the predictions as numbers, or None without constants, or if the learning rate reaches 2/L."""
    if theory is None or controller.lr.initial >= theory.constants().stable_lr():
        return None
    constants, lr, epsilon = theory.constants(), controller.lr.initial, theory.epsilon
    best, at = sgd.least_sfo(constants, lr, epsilon), sgd.critical_batch(constants, lr, epsilon)
    reached = tuple(sfo_to_target(constants, controller, epsilon, soonest=soonest) for soonest in bounds)
    return Target(epsilon=epsilon, sfo=reached, best_batch=at, best_sfo=best)
