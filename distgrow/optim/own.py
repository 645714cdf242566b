"""Optimizers of the user's own: an object, or by name a class or a function of the model."""

import copy
import importlib
import inspect
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import PrivateAttr

from distgrow.core.errors import ConfigError
from distgrow.core.optimizer_plan import AtGrowth
from distgrow.optim.at_growth import L2, remember
from distgrow.optim.base import OptimizerSpec
from distgrow.optim.groups import Group
from distgrow.optim.own_groups import check_parameters, recorded, shown

if TYPE_CHECKING:
    import torch
    from torch import nn

#: torch's optimizers that treat each number of a parameter alone, and whose state ZeRO resumes: not Adagrad.
_ELEMENTWISE = frozenset({"SGD", "Adam", "AdamW", "Adadelta", "RMSprop", "NAdam", "RAdam", "Adamax", "ASGD", "Rprop"})


class _Own(OptimizerSpec):
    """What an object and a name have in common."""

    elementwise: bool = False
    """Whether a step treats each number alone, whatever the parameter's shape: what ZeRO's flat shards need. Known of
    torch's own."""

    def decays(self) -> None:
        """See OptimizerSpec."""

    @property
    def state_copies(self) -> int:
        """See OptimizerSpec; a guess."""
        return 2

    def sharded_fault(self) -> str | None:
        """See OptimizerSpec."""
        return (
            None if self.elementwise else "is not known to treat each number alone (optimizer.elementwise=true says so)"
        )


class Given(_Own):
    """An optimizer that the user's code has built over the model's parameters."""

    kind: Literal["given"] = "given"
    of: str
    """Its class."""
    settings: dict[str, Any] = {}
    """Its settings that are plain values, and those of its groups, for config.yaml."""
    _optimizer: Any = PrivateAttr(default=None)

    @property
    def name(self) -> str:
        """See OptimizerSpec."""
        return self.of

    @property
    def optimizer(self) -> "torch.optim.Optimizer":
        """Return the optimizer."""
        return self._optimizer

    def build(self, groups: list[Group]) -> "torch.optim.Optimizer":
        """See OptimizerSpec; its groups are its own."""
        return self._optimizer

    def made(self, named: "Mapping[str, nn.Parameter]", model: "nn.Module") -> "torch.optim.Optimizer":
        """Check the optimizer against the model's parameters, and return it."""
        check_parameters(self._optimizer, named)
        return self._optimizer

    def copied(self, memo: dict[int, Any]) -> "Given":
        """See OptimizerSpec."""
        several = getattr(self._optimizer, "optimizers", [self._optimizer])
        return own(
            [_copied(one, memo) for one in several],
            clip=self.clip, elementwise=self.elementwise, at_growth=self.at_growth,
        )  # fmt: skip

    def check_own(self, named: "Mapping[str, nn.Parameter]", model: "nn.Module", base: float | None) -> None:
        """See OptimizerSpec; its rate is checked where it becomes a spec."""
        check_parameters(self._optimizer, named)

    def shown(self, named: "Mapping[str, nn.Parameter]", model: "nn.Module") -> list[str]:
        """See OptimizerSpec."""
        return shown(self._optimizer, named)

    @property
    def plain_sgd(self) -> bool:
        """See OptimizerSpec."""
        plain = _is_torchs(self._optimizer, frozenset({"SGD"}))  # not if it was read from a run's folder
        return plain and not any(group.get("momentum") for group in self._optimizer.param_groups)

    @property
    def l2(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """See OptimizerSpec."""
        decoupled = any(group.get("decoupled_weight_decay") for group in self._optimizer.param_groups)
        return _is_torchs(self._optimizer, L2) and not decoupled

    @property
    def penalty(self) -> float:
        """See OptimizerSpec."""
        return self._optimizer.param_groups[0].get("weight_decay", 0.0) if self.l2 else 0.0

    def penalties(self, named: "Mapping[str, nn.Parameter]") -> dict[str, float]:
        """See OptimizerSpec."""
        if not self.l2:
            return {}
        found = {id(p): g.get("weight_decay", 0.0) for g in self._optimizer.param_groups for p in g["params"]}
        return {name: found[id(p)] for name, p in named.items() if found.get(id(p))}


def own(
    optimizer: Any, *, clip: float | None = None, elementwise: bool = False, at_growth: AtGrowth | None = None
) -> Given:
    """Return an optimizer that is built already as `fit(optimizer=…)` takes it, with what torch's has no setting for.

    Args:
        optimizer: A torch.optim.Optimizer over the model's parameters, or several, which step together.
        clip: Largest norm of the mean gradient. None: no clipping.
        elementwise: Whether a step treats each number alone: what DeepSpeed needs. Known of torch's own.
        at_growth: What becomes of its memory when the batch changes. None: nothing.

    Raises:
        ConfigError: It is none, needs a closure, has made steps already, or has not what `at_growth` asks.
    """
    joined = _joined(optimizer, "optimizer")
    several = getattr(joined, "optimizers", [joined])
    made = Given(
        of=" + ".join(type(one).__name__ for one in several),
        settings=recorded(scaled(joined)), clip=clip, elementwise=elementwise or _is_torchs(joined, _ELEMENTWISE),
        at_growth=at_growth or AtGrowth(),
    )  # fmt: skip
    made._optimizer = joined
    remember(joined, made.at_growth, made.of)
    return made


class Target(_Own):
    """An optimizer by name: a class that takes parameter groups, or a function of the model."""

    always_shown: ClassVar[bool] = True

    kind: Literal["target"] = "target"
    target: str
    """package.module:name, such as torch.optim:Adadelta. A function of the model returns an optimizer, or several; how
    its groups' learning rates differ is kept."""
    args: dict[str, Any] = {}
    """Keyword arguments. The learning rate is lr.base."""

    @property
    def name(self) -> str:
        """See OptimizerSpec."""
        return self.target

    def build(self, groups: list[Group]) -> "torch.optim.Optimizer":
        """See OptimizerSpec."""
        found = self._found()
        try:
            made = found(groups, **self.args)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"optimizer.args={self.args!r} do not fit {self.target!r}: {error}") from None
        return _joined(made, f"optimizer.target={self.target!r}")

    def made(self, named: "Mapping[str, nn.Parameter]", model: "nn.Module") -> "torch.optim.Optimizer":
        """See OptimizerSpec."""
        optimizer = super().made(named, model) if isinstance(self._found(), type) else self._called(model)
        check_parameters(optimizer, named)
        return optimizer

    def check_own(self, named: "Mapping[str, nn.Parameter]", model: "nn.Module", base: float | None) -> None:
        """See OptimizerSpec."""
        made = self.ready(named, model)
        if base is not None and not isinstance(self._found(), type):
            check_base(made, base, f"optimizer.target={self.target!r}")

    def shown(self, named: "Mapping[str, nn.Parameter]", model: "nn.Module") -> list[str]:
        """See OptimizerSpec."""
        if isinstance(self._found(), type):
            return super().shown(named, model) if self.groups or self.no_decay else []
        return shown(self._called(model), named)

    def _called(self, model: "nn.Module") -> "torch.optim.Optimizer":
        """Return what the function makes."""
        if self.groups or self.no_decay:
            raise ConfigError(
                f"optimizer.target={self.target!r} is a function, which makes its own parameter groups; leave out "
                "optimizer.groups and no_decay, or name a class"
            )
        try:
            made = self._found()(model, **self.args)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"optimizer.target={self.target!r} of the model and {self.args!r}: {error}") from error
        return scaled(_joined(made, f"optimizer.target={self.target!r}"))

    def _found(self) -> Callable[..., Any]:
        module, _, name = self.target.partition(":")
        try:
            found = getattr(importlib.import_module(module), name, None) if module and name else None
        except ImportError as error:
            raise ConfigError(
                f"optimizer.target={self.target!r} does not import: {error}; is it beside the config, in the working "
                "directory or on PYTHONPATH?"
            ) from error
        if not callable(found):
            raise ConfigError(f"optimizer.target={self.target!r} must read package.module:name of a class or function")
        return found


def _copied(optimizer: "torch.optim.Optimizer", memo: dict[int, Any]) -> "torch.optim.Optimizer":
    """Return a copy over the copies of parameters in `memo`. torch's own way of copying leaves out a class's fields."""
    made = object.__new__(type(optimizer))
    made.__dict__ = copy.deepcopy(optimizer.__dict__, memo)
    return made


def _joined(made: Any, what: str) -> "torch.optim.Optimizer":
    """Return what a user's code made as one optimizer.

    Raises:
        ConfigError: It is none, needs a closure, has no learning rate, maximises, or has made steps already.
    """
    import torch

    from distgrow.optim.composite import Composite

    several = list(made) if isinstance(made, list | tuple) else [made]
    for optimizer in several:
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise ConfigError(
                f"{what} gave a {type(optimizer).__name__}; allowed is a torch.optim.Optimizer, or several"
            )
        closure = inspect.signature(type(optimizer).step).parameters.get("closure")
        if closure is not None and closure.default is inspect.Parameter.empty:
            raise ConfigError(
                f"{what}: {type(optimizer).__name__} needs a closure that computes the gradient anew, which a counted "
                "update cannot; use an optimizer whose step() needs none"
            )
        if any("lr" not in group for group in optimizer.param_groups):
            raise ConfigError(
                f"{what}: {type(optimizer).__name__} has no lr in its parameter groups, so its steps would not follow "
                "the schedule's learning rate; step by group['lr'], with lr among its defaults"
            )
        if any(group.get("maximize") for group in optimizer.param_groups):
            raise ConfigError(
                f"{what}: {type(optimizer).__name__} has maximize=True, and what looks at steps and evaluations takes "
                "less for better: leave it out, and let the loss return what is to be maximised times −1"
            )
        if any(map(_stepped, optimizer.state.values())):
            raise ConfigError(f"{what}: {type(optimizer).__name__} has made steps already; give a new one")
    if not several:
        raise ConfigError(f"{what} gave no optimizer")
    try:
        return several[0] if len(several) == 1 else Composite(several)
    except ValueError as error:
        raise ConfigError(f"{what}: {error}; give each parameter to one optimizer") from None


def rate_of(optimizer: "torch.optim.Optimizer") -> float:
    """Return the learning rate that an optimizer was built with: its default, or else its first group's; 0 if none."""
    rates = (optimizer.defaults.get("lr"), *(group.get("lr") for group in optimizer.param_groups))
    return next((float(rate) for rate in rates if rate), 0.0)


def scaled(optimizer: "torch.optim.Optimizer") -> "torch.optim.Optimizer":
    """Say in each group how its learning rate differs from the optimizer's, by `lr_scale`, and return the optimizer."""
    base = rate_of(optimizer)
    for group in optimizer.param_groups:
        if base and "lr_scale" not in group and not math.isclose(float(group["lr"]), base):
            group["lr_scale"] = float(group["lr"]) / base
    return optimizer


def check_base(optimizer: "torch.optim.Optimizer", base: float, what: str) -> None:
    """Check that an optimizer was built with the learning rate of the schedule, or with 0.

    Raises:
        ConfigError: It was built with another one.
    """
    if rate_of(optimizer) and not math.isclose(rate_of(optimizer), base):
        raise ConfigError(
            f"{what} has lr={rate_of(optimizer):g}, but lr.base is {base:g}, which would replace it; give both the same"
        )


def _is_torchs(optimizer: "torch.optim.Optimizer", names: frozenset[str]) -> bool:
    """Return whether an optimizer, or each of several, is exactly one of torch's own with these names."""
    several = getattr(optimizer, "optimizers", [optimizer])
    return all(type(o).__module__.startswith("torch.optim") and type(o).__name__ in names for o in several)


def _stepped(state: Mapping[str, Any]) -> bool:
    """Return whether a parameter's state tells of a step; Adagrad begins its state with the count 0."""
    return float(state.get("step", len(state))) > 0
