"""How many experts a model's tokens use: given to the model from a plan or at an evaluation; knows no engine."""

from typing import Protocol, cast

from torch import nn


class Sparse(Protocol):
    """A model with experts."""

    def activate(self, experts: int) -> None:
        """Let each token use so many experts from now on."""
        ...


def activate(model: nn.Module, experts: int | None) -> None:
    """Let each token of a model use so many experts from now on; None: leave the model as it is."""
    if experts is not None:
        cast(Sparse, model).activate(experts)
