"""What the config of a recorded run promised, for its report: the plan again; it starts and prints nothing."""

import yaml
from pydantic import ConfigDict, ValidationError

from distgrow.config.run import Theory
from distgrow.core.lr import LR
from distgrow.core.progress import Progress
from distgrow.core.spec import Spec
from distgrow.core.stages import Budget, Stages
from distgrow.engine.spec import SGD, Optimizer, plain_sgd
from distgrow.growth.controller import Controller
from distgrow.growth.schedule import Growth
from distgrow.planning.table import sfo_to_target, stages
from distgrow.report.planned import Forecast, Planned, Target
from distgrow.report.runs import Record
from distgrow.theory import sgd


class Schedule(Spec):
    """The keys of a config that decide batches and what the theory says of them; no other is needed.

    A run of fit() records no task.
    """

    model_config = ConfigDict(extra="ignore")

    growth: Growth
    stages: Stages
    lr: LR
    budget: Budget
    optimizer: Optimizer = SGD()
    theory: Theory | None = None


def foresee(record: Record) -> Planned | None:
    """The plan of a run, as if no update were skipped; None where its config.yaml is not one of this version's."""
    try:
        schedule = Schedule.model_validate(yaml.safe_load(record.config))
        controller = Controller(
            growth=schedule.growth,
            stages=schedule.stages,
            lr=schedule.lr,
            budget=schedule.budget,
            epoch=round(record.epoch),
        )
        return _planned(controller, schedule.theory if plain_sgd(schedule.optimizer) else None)
    except (yaml.YAMLError, ValidationError, ValueError, OverflowError, RecursionError):
        return None


def _planned(controller: Controller, given: Theory | None) -> Planned:
    adaptive = controller.growth.adaptive
    bounds = (False, True) if adaptive else (False,)
    forecasts = tuple(_forecast(controller, soonest) for soonest in bounds)
    ends = {} if adaptive else {stage.stage: stage.first_sample + stage.samples for stage in stages(controller)}
    return Planned(forecasts=forecasts, after=ends, target=_target(controller, given, bounds))


def _forecast(controller: Controller, soonest: bool) -> Forecast:
    found = list(controller.outline(Progress(), soonest=soonest))
    return Forecast(
        sfo=sum(batch * updates for _, batch, updates in found),
        updates=sum(updates for _, _, updates in found),
        last=max(stage for stage, _, _ in found),
        batch=max(batch for _, batch, _ in found),
    )


def _target(controller: Controller, given: Theory | None, bounds: tuple[bool, ...]) -> Target | None:
    """What outlook.predictions tells, as numbers; None without constants, or where the rate is beyond 2/L."""
    if given is None or controller.lr.base >= given.constants().stable_lr():
        return None
    constants, lr, epsilon = given.constants(), controller.lr.base, given.epsilon
    best, at = sgd.least_sfo(constants, lr, epsilon), sgd.critical_batch(constants, lr, epsilon)
    reached = tuple(sfo_to_target(constants, controller, epsilon, soonest=soonest) for soonest in bounds)
    return Target(epsilon=epsilon, sfo=reached, best_batch=at, best_sfo=best)
