"""TorchStep: one optimizer step from the mean gradient that the parameters hold; knows no engine."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from distgrow.core.plan import Plan
from distgrow.distributed.world import World
from distgrow.engine.averages import WeightAverage
from distgrow.engine.batches import check_memory, memory_for
from distgrow.engine.clipping import GradientNorm, clip_factor, clip_on_device, clip_over_items
from distgrow.engine.delayed import Delayed
from distgrow.engine.masks import Masks
from distgrow.engine.noise.hooks import MicroBatchNorms, StepProducts
from distgrow.engine.noise.metric import Roots, StepMetric
from distgrow.engine.noise.parameters import ParameterNoise
from distgrow.engine.noise.part_norms import tell_parts
from distgrow.engine.skipping import step_unless
from distgrow.engine.stats import UpdateStats
from distgrow.optim import OptimizerSpec, raw_step
from distgrow.optim.at_growth import assign, reset_moments
from distgrow.optim.composite import has_modes
from distgrow.optim.layout import lay_out_state


class TorchStep:
    """Clip the mean gradient, read what is measured of it, and step with it, or with the one that is due."""

    def __init__(
        self,
        spec: OptimizerSpec,
        optimizer: Any,
        parameters: Sequence[nn.Parameter],
        *,
        norms: MicroBatchNorms,
        products: StepProducts,
        world: World,
        items: bool,
        delay: int,
    ) -> None:
        """Take over an optimizer of `parameters`, and set it to training.

        Args:
            spec: The optimizer's.
            optimizer: It steps.
            parameters: Those that are trained.
            norms: What the hooks have seen of micro-batches.
            products: What the progress test takes of a step.
            world: The ranks.
            items: Whether the loss is a mean over items.
            delay: τ, updates after which a gradient is applied.
        """
        self.optimizer, self._parameters, self._world, self._items = optimizer, parameters, world, items
        self._clip, self._by_parts, self._state_copies = spec.clip, spec.goes_by_parts, spec.state_copies
        self._norms, self._products, self._modes = norms, products, has_modes(optimizer)
        self._norm = GradientNorm(parameters)
        self._metric = StepMetric(spec, optimizer, parameters)
        self.masks: Masks | None = None  #: of a model that is pruned
        self._delayed = Delayed(parameters, delay, copies=world.size > 1)  # DDP's buckets are used again
        self.noise = ParameterNoise(parameters)
        self.set_mode("train")

    def clipped_norm(self) -> Tensor:
        """Return the norm of the mean gradient, which is then clipped; a non-finite one is the same on every rank.

        With items it is not divided yet by what they are, and not clipped: see `over_items`.
        """
        norm = self._norm()
        if self._clip is not None and not self._items:
            nn.utils.clip_grads_with_norm_(self._parameters, self._clip, norm)
        return norm

    def over_items(self, weight: float, norm: float) -> float:
        """Divide the gradient by the items' `weight`, clip it, and return its norm between; `norm` without items."""
        return clip_over_items(self._parameters, self._clip, weight, norm) if self._items else norm

    def clipped_over_items(self, weight: Tensor, norm: Tensor) -> Tensor:
        """Do as `over_items`, on the device: the host does not wait."""
        return clip_on_device(self._parameters, self._clip, weight, norm) if self._items else norm

    def make(self, plan: Plan, stats: UpdateStats, grad_norm: float) -> tuple[float, float | None]:
        """Step, or keep the gradient until it is due. Collective.

        Args:
            plan: The update's.
            stats: Means over ranks.
            grad_norm: Norm of the mean gradient before it was clipped.

        Returns:
            The weight of the parameters in their average, and |g|² in the metric of the step if it was asked for.

        Raises:
            ConfigError: Memory does not hold the optimizer's state.
        """
        clipped = clip_factor(self._clip, grad_norm)
        try:
            self._products.before_step(self.optimizer)
            metric_sq = self._metric.square(clipped=clipped)
            self._products.fetch()  # waits for a GPU, which has no step to make yet
            listeners = self._listeners(plan)
            if listeners:
                tell_parts(listeners, self._norms, plan, stats, self._world, clipped=clipped, items=self._items)
            average = self._delayed.step(plan, self.step)
            self._products.after_step(self.optimizer)
        except (RuntimeError, MemoryError) as error:
            check_memory(error, "the optimizer's state")
            raise
        return average, metric_sq

    def _listeners(self, plan: Plan) -> list[Any]:
        """Return who wants to know the norms of micro-batches, parameter by parameter."""
        return [self.optimizer] * self._by_parts + [self.noise] * plan.by_parameter

    def step_unless(self, bad: Tensor, plan: Plan) -> list[list[Tensor]]:
        """Step unless `bad`, one truth value on the device, is true, which the host does not wait for.

        Returns:
            Inner products: see StepProducts.terms.
        """
        self.reset(plan)  # not undone, as the next update is planned as if this one had been made
        return step_unless(bad, self.optimizer, self._products, lambda: self.step(plan))

    def step(self, plan: Plan) -> None:
        """Make one optimizer step, with the settings that the plan gives each parameter group."""
        assign(self.optimizer.param_groups, plan)
        self.reset(plan)
        raw_step.step(self.optimizer)
        if self.masks is not None:
            self.masks.zero()  # whatever the optimizer has made of a gradient of 0

    def reset(self, plan: Plan) -> None:
        """Have the optimizer forget its first moments if the plan says so. Again, it changes nothing more."""
        if plan.optimizer is not None and plan.optimizer.reset:
            reset_moments(self.optimizer)

    def pruned(self, masks: Masks) -> None:
        """Set to 0 the optimizer's state, and the gradients in flight, of weights that are pruned."""
        masks.zero_beside(lambda parameter: self.optimizer.state.get(parameter, {}).values())
        for gradients in self._delayed.gradients():
            masks.zero_beside(lambda parameter, gradients=gradients: [gradients.get(parameter)])

    def drain(self, average: Callable[[], WeightAverage]) -> bool:
        """Step with all gradients in flight, and return whether there were any; `average` gives that of parameters."""
        return self._delayed.drain(self.step, average)

    def roots(self, plan: Plan) -> Roots | None:
        """Return √P of the coming step −η·P·g, if the plan's noise is measured in that metric."""
        return self._metric.begin(plan)

    def reserve(self, plan: Plan) -> list[Tensor]:
        """Return what takes the memory of a step; nothing once the state and the gradients in flight are there."""
        state = self._state_copies + self._products.copies(plan) + (plan.average > 0) + plan.preconditioned
        copies = self._delayed.missing + (0 if self.optimizer.state else state)
        with memory_for("the optimizer's state"):
            return [torch.empty_like(p) for p in self._parameters for _ in range(copies)]

    # ── beside updates ──────────────────────────────────────────────────────────────────────────────────────────

    def set_mode(self, mode: str) -> None:
        """Call the optimizer's train() or eval(), which schedule-free ones have."""
        if self._modes:
            getattr(self.optimizer, mode)()

    @contextmanager
    def at_rest(self) -> Iterator[bool]:
        """Give the parameters the values of the optimizer's evaluation mode inside the context.

        Afterwards they are what they were to the last bit, so that training does not depend on who looks at it. Yields
        whether the optimizer has such a mode.
        """
        if not self._modes:
            yield False
            return
        kept = [parameter.detach().clone() for parameter in self._parameters]
        self.set_mode("eval")
        try:
            yield True
        finally:
            self.set_mode("train")
            with torch.no_grad():
                for parameter, value in zip(self._parameters, kept, strict=True):
                    parameter.copy_(value)

    def state(self) -> dict[str, Any]:
        """Return the optimizer's state and the gradients in flight, by their keys of a checkpoint."""
        kept = {"delayed": self._delayed.state() or None, "parameter_noise": self.noise.state()}
        return {
            "optimizer": self.optimizer.state_dict(),
            **{name: value for name, value in kept.items() if value is not None},
        }

    def load(self, state: dict[str, Any]) -> None:
        """Take over what `state` returned, out of all that a checkpoint holds.

        Raises:
            ValueError: It is of other parameters.
        """
        self.optimizer.load_state_dict(state["optimizer"])
        lay_out_state(self.optimizer)
        self._delayed.load(state.get("delayed", ()))
        self.noise.load(state.get("parameter_noise"))
