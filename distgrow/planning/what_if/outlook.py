"""what_if(): other schedules for a recorded run, ranked by the loss that a law predicts; trains nothing."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from pydantic import ValidationError

from distgrow.config.batch_tokens import tokens_of
from distgrow.core.errors import ConfigError
from distgrow.core.lr import Span
from distgrow.core.pace import Pace, Stretch, cost, fitted
from distgrow.core.progress import Progress
from distgrow.core.yaml_text import plain, read_text
from distgrow.growth.base import Capped
from distgrow.growth.controller import Controller
from distgrow.growth.matched import Matched
from distgrow.optim.own_groups import without_rate
from distgrow.optim.sgd import SGD
from distgrow.planning.forecast import Recorded, even, foresee, stages
from distgrow.planning.what_if.candidates import Given, Setting, wanted
from distgrow.planning.what_if.fit import Fit, fit
from distgrow.planning.what_if.observed import Observed, observed
from distgrow.report.planned import Planned, Prospect
from distgrow.report.runs import Record
from distgrow.theory.scaling_law import course

#: Schedules that a report shows.
SHOWN = 3
#: Sections of a config in which runs that are fitted together have to be equal.
ALIKE = ("task", "model", "optimizer")
#: What changes the model or the gradients as a run goes on, which the law does not know.
UNKNOWN = ("sparsity", "active", "extrapolate")


@dataclass(frozen=True, slots=True, kw_only=True)
class Past:
    """Hold what another run of the fit has come to, as the law has it."""

    name: str
    loss: float
    updates: int
    seconds: float
    ended: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Outlook:
    """Hold what is predicted for the budget of one run."""

    name: str  #: of the run
    metric: str
    loss: float  #: that the run has come to, as the law has it
    updates: int
    seconds: float
    ended: bool
    seen: Observed
    fit: Fit
    beside: Sequence[Past]  #: the other runs that the law was fitted to
    pace: Pace | None
    why_no_pace: str  #: empty if there is one
    prospects: Sequence[Prospect]  #: the least loss first
    left_out: Mapping[str, str]  #: schedules that this budget cannot have, and why


def what_if(
    record: Record,
    policies: Sequence[str] = (),
    *,
    beside: Sequence[Record] = (),
    everything: bool = False,
    metric: str | None = None,
) -> Outlook:
    """Return what other schedules would have come to.

    Args:
        record: The run.
        policies: Schedules; see candidates.wanted.
        beside: Other runs of the same task, model and optimizer, which the law is fitted to as well.
        everything: Whether to add every schedule that does not measure.
        metric: A metric of the test set that falls; None: the training loss.

    Raises:
        ConfigError: A run shows too little or is of another kind, or a policy cannot be carried out.
    """
    config = _config(record)
    seen, law = _fitted(record, beside, config, metric)
    setting = _setting(record, config, seen)
    pace, why = _pace(record)
    prospects, left_out = list[Prospect](), dict[str, str]()
    for name, values in wanted(setting, list(policies), everything):
        try:
            prospects.append(_prospect(name, setting.controller(values), law, pace, _world(record)))
        except ConfigError as error:
            if name in policies or name not in setting.all():
                raise ConfigError(f"--policy={name}: {error}") from None
            left_out[name] = str(error)
    return Outlook(
        name=record.name,
        metric=metric or "training loss",
        loss=law.end,
        updates=record.updates,
        seconds=record.last.time_s,
        ended=record.ended,
        seen=seen,
        fit=law,
        beside=[_past(other, float(end)) for other, end in zip(beside, law.ends[1:], strict=True)],
        pace=pace,
        why_no_pace=why,
        prospects=sorted(prospects, key=lambda prospect: prospect.loss),
        left_out=left_out,
    )


def foresee_more(record: Record) -> Planned | None:
    """Return the plan of a run with the best of its prospects, if it shows enough for them.

    A report needs no prospects, so whatever cannot be computed of them only leaves them out.
    """
    planned = foresee(record)
    try:
        best = what_if(record).prospects[:SHOWN] if planned is not None and record.ended else ()
    except (ValueError, ArithmeticError):  # ConfigError is a ValueError
        best = ()
    return None if planned is None else replace(planned, prospects=tuple(best))


def _config(record: Record) -> Recorded:
    """Return what a run's config.yaml says of its schedule."""
    try:
        values: Any = plain(read_text(record.config, "config.yaml"))
        config = Recorded.model_validate(values)
    except (ValidationError, ValueError, RecursionError):
        raise ConfigError(f"{record.name}: its config.yaml holds no growth and lr that this version can read") from None
    if found := [key for key in UNKNOWN if values.get(key) is not None]:
        raise ConfigError(f"{record.name} has {found[0]}, of which the law of what-if knows nothing; give another run")
    return config


def _fitted(record: Record, beside: Sequence[Record], config: Recorded, metric: str | None) -> tuple[Observed, Fit]:
    """Return what the first run shows, and the law that fits all of them."""
    for other in beside:
        _check_alike(record, other)
    seen = [observed(each, metric) for each in (record, *beside)]
    momentum = config.optimizer.momentum if isinstance(config.optimizer, SGD) else None
    return seen[0], fit(seen, momentum)


def _check_alike(record: Record, other: Record) -> None:
    """Raise ConfigError if two runs cannot follow one law."""
    _config(other)
    one, two = (plain(read_text(each.config, "config.yaml")) for each in (record, other))
    for key in ALIKE:
        if without_rate(one.get(key)) != without_rate(two.get(key)):
            raise ConfigError(
                f"{other.name}: its {key} is not that of {record.name}, so one law cannot fit both; give runs that "
                "differ in growth, lr, budget or seed alone"
            )
    if round(record.epoch) != round(other.epoch):
        raise ConfigError(
            f"{other.name}: its training set has {other.epoch:,.0f} samples, that of {record.name} has "
            f"{record.epoch:,.0f}; give runs of the same task"
        )


def _past(record: Record, loss: float) -> Past:
    """Return what a run has come to."""
    seconds = record.last.time_s
    return Past(name=record.name, loss=loss, updates=record.updates, seconds=seconds, ended=record.ended)


def _setting(record: Record, config: Recorded, seen: Observed) -> Setting:
    """Return what all schedules share with the run."""
    epoch, start = max(1, round(record.epoch)), record.first_batch
    span = Span(samples=seen.samples, epoch=epoch)
    own = config.growth.cap if isinstance(config.growth, Capped) else None
    cap = own or Matched(start=start).for_run(span).cap or start
    return Setting(
        start=start,
        cap=max(start, cap),
        lr=config.lr,
        samples=seen.samples,
        epoch=epoch,
        own=Given(growth=config.growth, lr=config.lr, stages=config.stages),
        rule=config.optimizer.growth_rule,
        tokens=tokens_of(config.task),
    )


def _world(record: Record) -> int:
    """Return the ranks of the last update; 1 if the run does not say."""
    world = record.steps["world"][-1]
    return int(world) if world > 0 else 1


def _pace(record: Record) -> tuple[Pace | None, str]:
    """Return the pace of the run's updates, or why there is none."""
    steps, seconds = record.steps, record.seconds()
    known = np.isfinite(seconds) & (steps["world"] > 0)
    columns = (steps["batch"][known].astype(int), steps["world"][known].astype(int), seconds[known])
    try:
        return fitted(zip(*(column.tolist() for column in columns), strict=True)), ""
    except ConfigError as error:
        return None, str(error)


def _prospect(name: str, controller: Controller, law: Fit, pace: Pace | None, world: int) -> Prospect:
    """Return what a schedule comes to.

    Its largest batch is one that growth decides: the rest of a budget that joins the last update is not in it.
    """
    parts = [part for stage in stages(controller) for part in even(controller, stage)]
    loss, low, high = law.predict(course(parts))
    outline = list(controller.outline(Progress()))
    stretches = [Stretch(batch=batch, updates=updates, world=world) for _, batch, updates in outline]
    return Prospect(
        name=name,
        loss=loss,
        low=low,
        high=high,
        updates=sum(updates for _, _, updates in outline),
        batch=max(min(batch, controller.growth.stage_batch(stage)) for stage, batch, _ in outline),
        seconds=None if pace is None else cost(pace, stretches).seconds,
    )
