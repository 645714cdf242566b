"""Composite: several torch optimizers as one, each over its own parameters."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from distgrow.optim.raw_step import step


class Composite(torch.optim.Optimizer):
    """Step several optimizers together. Their parameter groups and states are seen as those of one."""

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        """Join the optimizers.

        Raises:
            ValueError: A parameter is in two of them.
        """
        self.optimizers = list(optimizers)
        super().__init__(self._groups(), dict(self.optimizers[0].defaults))
        self.join()

    def _groups(self) -> list[dict[str, Any]]:
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def join(self) -> None:
        """Show the groups and states that the optimizers have now."""
        self.param_groups = self._groups()
        self._joined = len(self.param_groups)
        self.state = _States(self.optimizers)  # pyright: ignore[reportAttributeAccessIssue]

    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Make one step of each, of the groups that `param_groups` holds: ZeRO leaves one at a time there."""
        if len(self.param_groups) == self._joined:
            for optimizer in self.optimizers:
                step(optimizer)
            return
        shown = {id(group) for group in self.param_groups}
        for optimizer in self.optimizers:
            groups = optimizer.param_groups
            optimizer.param_groups = [group for group in groups if id(group) in shown]
            try:
                if optimizer.param_groups:
                    step(optimizer)
            finally:
                optimizer.param_groups = groups

    def train(self) -> None:
        """Put those that have modes into training mode."""
        for optimizer in filter(has_modes, self.optimizers):
            optimizer.train()  # pyright: ignore[reportAttributeAccessIssue]

    def eval(self) -> None:
        """Put those that have modes into evaluation mode."""
        for optimizer in filter(has_modes, self.optimizers):
            optimizer.eval()  # pyright: ignore[reportAttributeAccessIssue]

    def state_dict(self) -> dict[str, Any]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return the state of each."""
        return {"optimizers": [optimizer.state_dict() for optimizer in self.optimizers]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Load what `state_dict` returned.

        Raises:
            ValueError: It is of other optimizers.
        """
        states = state_dict.get("optimizers", ())
        if len(states) != len(self.optimizers):
            raise ValueError(f"it holds {len(states)} optimizers, of which there are {len(self.optimizers)} now")
        for optimizer, state in zip(self.optimizers, states, strict=True):
            optimizer.load_state_dict(state)
        self.join()


class _States:
    """The states of all parameters, each kept by its own optimizer."""

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        self._optimizers = optimizers
        self._owner = {id(p): o for o in optimizers for group in o.param_groups for p in group["params"]}

    def _of(self, parameter: torch.Tensor) -> torch.optim.Optimizer:
        """Return the optimizer of a parameter; ZeRO replaces parameters by its shards, some at a time."""
        if id(parameter) not in self._owner:
            there = ((o, p) for o in self._optimizers for group in o.param_groups for p in group["params"])
            self._owner[id(parameter)] = next(o for o, p in there if p is parameter)
        return self._owner[id(parameter)]

    def __getitem__(self, parameter: torch.Tensor) -> dict[str, Any]:
        return self._of(parameter).state[parameter]

    def get(self, parameter: torch.Tensor, default: Any = None) -> Any:
        """Return the state of a parameter, `default` if it has none."""
        return self._of(parameter).state.get(parameter, default)

    def __bool__(self) -> bool:
        return any(optimizer.state for optimizer in self._optimizers)

    def __len__(self) -> int:
        return sum(len(optimizer.state) for optimizer in self._optimizers)

    def values(self) -> Iterator[dict[str, Any]]:
        """Yield the states of all parameters that have one."""
        return (state for optimizer in self._optimizers for state in optimizer.state.values())


def repoint(optimizer: torch.optim.Optimizer, parameters: Mapping[int, torch.Tensor]) -> None:
    """Let an optimizer that has made no step train others in place of its parameters, which are given by their id."""
    for one in getattr(optimizer, "optimizers", [optimizer]):
        for group in one.param_groups:
            group["params"] = [parameters[id(parameter)] for parameter in group["params"]]
    if isinstance(optimizer, Composite):
        optimizer.join()


def has_modes(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether an optimizer has train() and eval(), as schedule-free ones have."""
    if isinstance(optimizer, Composite):
        return any(map(has_modes, optimizer.optimizers))
    return callable(getattr(optimizer, "train", None)) and callable(getattr(optimizer, "eval", None))
