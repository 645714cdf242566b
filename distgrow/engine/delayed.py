"""Delayed: the gradients that an engine applies τ updates late, and the plans that they belong to; knows no engine."""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any, NamedTuple

from torch import Tensor, nn

from distgrow.core.optimizer_plan import AtGrowth, OptimizerPlan
from distgrow.core.plan import Plan
from distgrow.engine.averages import WeightAverage
from distgrow.engine.batches import memory_for
from distgrow.optim.layout import as_laid_out


class InFlight(NamedTuple):
    """Hold a gradient that is not applied yet, mean and clipped, and the plan of its update."""

    plan: Plan
    gradient: list[Tensor | None]  #: in the parameters' order


class Delayed:
    """Keep gradients until τ later ones have been taken: first in, first out."""

    def __init__(self, parameters: Sequence[nn.Parameter], delay: int, *, copies: bool) -> None:
        """Begin with nothing in flight.

        Args:
            parameters: Those that are trained.
            delay: τ, updates; 0: every gradient is due at once.
            copies: Whether gradients have to be copied, as the memory of the parameters' `grad` is used again.
        """
        self._parameters, self._delay, self._copies = parameters, delay, copies
        self._queue = deque[InFlight]()

    @property
    def missing(self) -> int:
        """Return how many tensors a parameter is still to have beside its gradient."""
        return self._delay - len(self._queue) + self._copies if self._delay else 0

    def step(self, plan: Plan, step: Callable[[Plan], None]) -> float:
        """Take the gradients of `plan` from the parameters, and step with those that are due, if any are.

        Args:
            plan: That of the present gradients.
            step: Makes a step of a plan with the gradients that the parameters have.

        Returns:
            The weight in their average of the parameters as they are now.
        """
        if self._delay:
            with memory_for("a gradient in flight", "lower engine.delay, or use a smaller model"):
                now = [p.grad.clone() if self._copies and p.grad is not None else p.grad for p in self._parameters]
            self._queue.append(InFlight(plan, now))
            if len(self._queue) <= self._delay:
                return 0.0
            plan = self._oldest()
        step(plan)
        return plan.average

    def drain(self, step: Callable[[Plan], None], average: Callable[[], WeightAverage]) -> bool:
        """Step with all gradients in flight, the oldest first, and return whether there were any.

        Args:
            step: See `step`.
            average: Gives the average of the parameters, for plans that have a weight in it.
        """
        drained = len(self._queue) > 0
        while self._queue:
            plan = self._oldest()
            step(plan)
            if plan.average:
                average().update(plan.average)
        return drained

    def gradients(self) -> Iterator[dict[nn.Parameter, Tensor | None]]:
        """Yield each gradient in flight, by parameter."""
        yield from (dict(zip(self._parameters, entry.gradient, strict=True)) for entry in self._queue)

    def _oldest(self) -> Plan:
        """Give the parameters the oldest gradients, and return the plan of these."""
        plan, gradient = self._queue.popleft()
        for parameter, value in zip(self._parameters, gradient, strict=True):
            parameter.grad = value
        return plan

    def state(self) -> list[dict[str, Any]]:
        """Return the gradients in flight and their plans as tensors and plain values."""
        return [{"plan": plain_plan(plan), "gradient": gradient} for plan, gradient in self._queue]

    def load(self, state: Sequence[Mapping[str, Any]]) -> None:
        """Take over what `state` returned.

        Raises:
            ValueError: It is of other parameters.
        """
        shapes = [parameter.shape for parameter in self._parameters]
        self._queue.clear()
        for entry in state:
            gradient: list[Tensor | None] = entry["gradient"]
            found = [shape if value is None else value.shape for value, shape in zip(gradient, shapes, strict=True)]
            if found != shapes:
                raise ValueError("it holds gradients in flight of other parameters")
            pairs = zip(gradient, self._parameters, strict=True)
            given = [None if value is None else as_laid_out(value, parameter) for value, parameter in pairs]
            self._queue.append(InFlight(plan_of(entry["plan"]), given))


def plain_plan(plan: Plan) -> dict[str, Any]:
    """Return a plan as plain values."""
    values = {field.name: getattr(plan, field.name) for field in fields(plan)}
    if (how := plan.optimizer) is not None:
        numbers = {field.name: getattr(how, field.name) for field in fields(how)}
        values["optimizer"] = {**numbers, "spec": how.spec.model_dump()}
    return values


def plan_of(values: Mapping[str, Any]) -> Plan:
    """Return the plan of plain values. The inverse of `plain_plan`."""
    how = values["optimizer"]
    optimizer = None if how is None else OptimizerPlan(**{**how, "spec": AtGrowth(**how["spec"])})
    return Plan(**{**values, "optimizer": optimizer})
