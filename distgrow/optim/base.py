"""OptimizerSpec: what every optimizer tells the rest of the package about itself; importing this loads no torch."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import model_validator

from distgrow.core.errors import ConfigError
from distgrow.core.lr import Rule
from distgrow.core.optimizer_plan import AtGrowth, OptimizerPlan
from distgrow.core.spec import PosFloat, Spec
from distgrow.optim.at_growth import KEYS, L2_FAULT, NO_DAMPENING_FAULT, refuse, remember
from distgrow.optim.groups import Group, Grouped, ParameterGroup, grouped

if TYPE_CHECKING:
    import torch
    from torch import nn

    from distgrow.optim.direction import Direction, Preconditioner


class OptimizerSpec(Spec, ABC):
    """Hold an optimizer's settings. A subclass gives `kind` and `build`, and replaces the defaults that differ.

    No other module asks for an optimizer's type.
    """

    scaling: ClassVar[Literal["linear", "sqrt"]] = "sqrt"
    """How probe-batch's branches raise the learning rate with the batch, if not told otherwise."""
    growth_rule: ClassVar[Rule | None] = None
    """How the learning rate follows a growing batch, if neither `lr.rule` nor the policy says. None: as √b."""
    per_tensor: ClassVar[bool] = False
    skips_on_device: ClassVar[bool] = False  #: whether a step that is not finite can be undone on the device alone
    """Whether a step uses a norm, or the shape, of a whole parameter; ZeRO's flat shards have neither."""
    joins: ClassVar[bool] = False
    """Whether its steps can be made on rows of parameters, as its torch optimizer has `joined` to ask other ranks; see
    distgrow.optim.joined."""
    joins_flat: ClassVar[bool] = False
    """Whether its steps can be made on flat shards too, as its torch optimizer has `flat` to ask other ranks."""
    goes_by_parts: ClassVar[bool] = False
    """Whether steps use the norms of the gradients of single micro-batches, which are then measured. The torch
    optimizer has a method `see` for them."""
    always_shown: ClassVar[bool] = False
    """Whether it trains some parameters otherwise than others, without being asked to."""
    adam_moments: ClassVar[bool] = False
    """Whether the state is `exp_avg` and `exp_avg_sq`, the only one that DeepSpeed's universal format knows."""
    l2: ClassVar[bool] = False
    """Whether `weight_decay` is an L2 penalty: steps add λθ to the gradient, as part of the objective."""

    undamped: ClassVar[bool] = False
    """Whether momentum adds gradients up, and knows no dampening: with less momentum its steps would be shorter."""

    clip: PosFloat | None = None
    """Largest norm of the mean gradient; none: no clipping."""
    groups: list[ParameterGroup] = []
    """Parameters with a learning rate or a weight decay of their own, by name or number of dimensions. The first group
    that a parameter matches has it. All others train by the settings above."""
    no_decay: bool = False
    """No weight decay for parameters of less than two dimensions (biases, norms) that no group has."""

    at_growth: AtGrowth = AtGrowth()
    """What becomes of its memory when the batch changes."""

    @model_validator(mode="after")
    def _has_what_is_asked_at_growth(self) -> "OptimizerSpec":
        refuse(self.at_growth, self.decays(), self.name, fault=self.growth_fault)
        return self

    def decays(self) -> Mapping[str, float] | None:
        """Return the settings that can follow the batch, by their keys of `at_growth`. None: its groups will tell."""
        own = {key: [getattr(self, name) for name in names if hasattr(self, name)] for key, names in KEYS.items()}
        return {key: max(values) for key, values in own.items() if values}

    def growth_fault(self, key: str) -> str | None:
        """Return why the setting of a key of `at_growth` cannot follow the batch; None if it can."""
        if key == "momentum" and self.undamped:
            return NO_DAMPENING_FAULT
        return L2_FAULT if key == "weight_decay" and self.l2 else None

    def at(self, plan: OptimizerPlan | None) -> dict[str, float]:
        """Return the settings that follow the batch, as they are at an update, by their keys of `at_growth`."""
        decays = self.decays() if plan is not None else None
        return {} if plan is None or not decays else {key: getattr(plan, key)(decays[key]) for key in plan.spec.asked()}

    @property
    def name(self) -> str:
        """Return its `optimizer.kind`."""
        return type(self).model_fields["kind"].default

    @property
    def summary(self) -> str:
        """Return its kind, and the settings that tell it from plain SGD, for messages."""
        return self.name

    @property
    def penalty(self) -> float:
        """Return λ of the L2 penalty (λ/2)|θ|² that its steps add to the objective; 0 if they add none.

        A group's own λ may differ: see `penalties`.
        """
        return getattr(self, "weight_decay", 0.0) if self.l2 else 0.0

    @property
    def plain_sgd(self) -> bool:
        """Return whether a step is θ − η·g and no more."""
        return False

    @property
    def state_copies(self) -> int:
        """Return how many times the parameters' size its state takes."""
        return 1

    @abstractmethod
    def build(self, groups: list[Group]) -> "torch.optim.Optimizer":
        """Build the torch optimizer with learning rate 0: every update assigns its own.

        Args:
            groups: The parameter groups, as torch's optimizers take them.
        """

    def made(self, named: "Mapping[str, nn.Parameter]", model: "nn.Module") -> "torch.optim.Optimizer":
        """Build the torch optimizer of a model's parameters, in their groups.

        Args:
            named: The parameters by name: the model's, and with "loss." before the name those of the loss.
            model: The model.

        Raises:
            ConfigError: A group has no parameter, or the optimizer knows no weight decay.
        """
        made = self.build([group.for_torch() for group in self.grouped(named)])
        if (self.no_decay or any(g.weight_decay is not None for g in self.groups)) and not _decays(made):
            raise ConfigError(
                f"optimizer.kind={self.name} has no weight_decay, which optimizer.groups or no_decay sets; leave it out"
            )
        return made

    def ready(self, named: "Mapping[str, nn.Parameter]", model: "nn.Module") -> "torch.optim.Optimizer":
        """Build the torch optimizer as `made` does, its groups ready to follow the batch.

        Raises:
            ConfigError: See `made`; or it has not what is to follow the batch.
        """
        made = self.made(named, model)
        remember(made, self.at_growth, self.name)
        return made

    def copied(self, memo: dict[int, Any]) -> Self:
        """Return the same for a copy of the model.

        Args:
            memo: What copy.deepcopy(model, memo) has noted, by which an optimizer of the user's own finds parameters.
        """
        return self

    def check_own(self, named: "Mapping[str, nn.Parameter]", model: "nn.Module", base: float | None) -> None:
        """Check an optimizer of the user's own before a run has a folder; others have nothing to check.

        Args:
            named: As for `made`.
            model: The model.
            base: The schedule's first learning rate. None: it is measured, and the optimizer's own is not compared.

        Raises:
            ConfigError: It was built with another learning rate, or over other parameters.
        """

    def grouped(self, named: "Mapping[str, nn.Parameter]") -> list[Grouped]:
        """Return the parameters in their groups."""
        return grouped(named, self.groups, no_decay=self.no_decay)

    def shown(self, named: "Mapping[str, nn.Parameter]", model: "nn.Module") -> list[str]:
        """Return a line for each group of the parameters; none if all train alike. Arguments as for `made`."""
        told = self.always_shown or self.groups or self.no_decay
        return [group.shown() for group in self.grouped(named)] if told else []

    def penalties(self, named: "Mapping[str, nn.Parameter]") -> dict[str, float]:
        """Return λ of each parameter's L2 penalty, by name; those without one are left out."""
        if not self.l2:
            return {}
        found = {name: g.own.get("weight_decay", self.penalty) for g in self.grouped(named) for name in g.names}
        return {name: penalty for name, penalty in found.items() if penalty}

    def sharded_fault(self) -> str | None:
        """Return why ZeRO's flat shards, which cut parameters anywhere, cannot make its steps; None if they can."""
        return "goes by norms or shapes of whole parameters" if self.per_tensor else None

    def fused_adamw(self) -> "dict[str, object] | None":
        """Return the settings of a fused AdamW kernel that makes the same steps, None if there is none."""
        return None

    def direction(self) -> "Direction":
        """Return how to find u, the direction of the last step θ − η·u; by default it is measured from the step."""
        from distgrow.optim.direction import MeasuredStep

        return MeasuredStep()

    def preconditioner(self) -> "Preconditioner | None":
        """Return how to find P of the coming step −η·P·g, apart from its momentum; None if that is not known."""
        return None


def fused(groups: list[Group]) -> bool:
    """Return whether torch's fused kernels can step all parameters: they know no complex numbers, strides, meta device.

    A fused AdamW step takes half the time of the default one, on a CPU too.
    """
    from distgrow.optim.layout import without_gaps

    return not any(p.is_complex() or p.is_meta or not without_gaps(p) for p in parameters_of(groups))


def parameters_of(groups: Sequence[Group]) -> "Iterator[nn.Parameter]":
    """Yield the parameters of all groups."""
    return (parameter for group in groups for parameter in group["params"])


def _decays(optimizer: "torch.optim.Optimizer") -> bool:
    """Return whether every group has a weight decay that the optimizer itself knows."""
    return "weight_decay" in optimizer.defaults
