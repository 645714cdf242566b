"""Direction: how to find u, the direction of an optimizer's last step θ − η·u, from its state or from the step."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

State = dict[str, Any]
Group = dict[str, Any]

#: Name in the optimizer's state, and so in checkpoints, of a direction that is kept beside what the optimizer keeps.
KEPT = "direction"


class Direction(Protocol):
    """Find u of an optimizer's last step, one tensor a parameter."""

    @property
    def copies(self) -> int:
        """Return how many tensors of a parameter's size are kept beside the optimizer's own state."""
        ...

    def known(self, state: State) -> bool:
        """Return whether a parameter with this state has taken a step whose direction can be found."""
        ...

    def last(self, states: Sequence[State], group: Group) -> Iterable[Tensor]:
        """Yield u for the state of every parameter, all of them known."""
        ...

    def before_step(self, parameters: Sequence[Tensor], states: Sequence[State], penalty: float) -> None:
        """Keep what the coming step will overwrite.

        Args:
            parameters: They have mean gradients, clipped.
            states: Their states.
            penalty: λ of their L2 penalty, which the gradients do not include.
        """
        ...

    def after_step(self, parameters: Sequence[Tensor], states: Sequence[State], lr: float) -> None:
        """Keep what the step at learning rate `lr` has shown."""
        ...


#: Yields P of the coming step −η·P·g for the state of every parameter of a group: a new tensor with a number for each
#: of the parameter's; of a complex one, for each real number.
Preconditioner = Callable[[Sequence[State], Group], Iterable[Tensor]]


@dataclass(frozen=True, slots=True)
class FromState:
    """Read u out of the state that the optimizer keeps anyway, which has `key` from the first step on."""

    key: str
    read: Callable[[Sequence[State], Group], Iterable[Tensor]]

    @property
    def copies(self) -> int:
        """See Direction."""
        return 0

    def known(self, state: State) -> bool:
        """See Direction."""
        return state.get(self.key) is not None

    def last(self, states: Sequence[State], group: Group) -> Iterable[Tensor]:
        """See Direction."""
        return self.read(states, group)

    def before_step(self, parameters: Sequence[Tensor], states: Sequence[State], penalty: float) -> None:
        """See Direction."""

    def after_step(self, parameters: Sequence[Tensor], states: Sequence[State], lr: float) -> None:
        """See Direction."""


class _Kept:
    """Keep one tensor a parameter, under KEPT in the optimizer's state."""

    copies = 1

    def known(self, state: State) -> bool:
        """See Direction."""
        return KEPT in state

    def last(self, states: Sequence[State], group: Group) -> Iterable[Tensor]:
        """See Direction."""
        return (state[KEPT] for state in states)


class KeptGradient(_Kept):
    """Keep the gradient that a step takes, with λθ of the L2 penalty: u of plain SGD."""

    def before_step(self, parameters: Sequence[Tensor], states: Sequence[State], penalty: float) -> None:
        """See Direction."""
        for parameter, state in zip(parameters, states, strict=True):
            if KEPT not in state:
                state[KEPT] = torch.empty_like(parameter)
        kept, gradients = [state[KEPT] for state in states], [parameter.grad for parameter in parameters]
        torch._foreach_copy_(kept, gradients)  # pyright: ignore[reportPrivateImportUsage, reportArgumentType]
        if penalty:
            torch._foreach_add_(kept, list(parameters), alpha=penalty)  # pyright: ignore[reportPrivateImportUsage]

    def after_step(self, parameters: Sequence[Tensor], states: Sequence[State], lr: float) -> None:
        """See Direction."""


class MeasuredStep(_Kept):
    """Measure (θ − θ′)/η of a step from θ to θ′: u of any optimizer, decoupled decay included; NaN if η is 0."""

    def __init__(self) -> None:
        # θ is not put into the state before the step: many optimizers begin theirs only if it is empty
        self._before: dict[Tensor, Tensor] = {}

    def before_step(self, parameters: Sequence[Tensor], states: Sequence[State], penalty: float) -> None:
        """See Direction."""
        for parameter, state in zip(parameters, states, strict=True):
            place = state.pop(KEPT, None)
            self._before[parameter] = parameter.clone() if place is None else place.copy_(parameter)

    def after_step(self, parameters: Sequence[Tensor], states: Sequence[State], lr: float) -> None:
        """See Direction."""
        for parameter, state in zip(parameters, states, strict=True):
            state[KEPT] = self._before.pop(parameter).sub_(parameter).div_(lr)


def real(tensor: Tensor) -> Tensor:
    """Return a complex tensor as pairs of real numbers, any other tensor as it is."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
