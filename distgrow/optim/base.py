"""OptimizerSpec: what every optimizer tells the rest of the package about itself; importing this loads no torch."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from distgrow.core.spec import PosFloat, Spec

if TYPE_CHECKING:
    import torch
    from torch import nn

    from distgrow.optim.direction import Direction


class OptimizerSpec(Spec, ABC):
    """Hold an optimizer's settings. A subclass gives `kind` and `build`, and replaces the defaults that differ.

    No other module asks for an optimizer's type.
    """

    scaling: ClassVar[Literal["linear", "sqrt"]] = "sqrt"
    """How the learning rate follows the batch where other settings leave it open."""
    per_tensor: ClassVar[bool] = False
    """Whether a step uses a norm, or the shape, of a whole parameter; ZeRO's flat shards have neither."""
    adam_moments: ClassVar[bool] = False
    """Whether the state is `exp_avg` and `exp_avg_sq`, the only one that DeepSpeed's universal format knows."""

    clip: PosFloat | None = None
    """Largest norm of the mean gradient; none: no clipping."""

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
        """Return λ of the L2 penalty (λ/2)|θ|² that its steps add to the objective; 0 if they add none."""
        return 0.0

    @property
    def plain_sgd(self) -> bool:
        """Return whether a step is θ − η·g and no more."""
        return False

    @property
    def state_copies(self) -> int:
        """Return how many times the parameters' size its state takes."""
        return 1

    @abstractmethod
    def build(self, parameters: "Sequence[nn.Parameter]") -> "torch.optim.Optimizer":
        """Build the torch optimizer with learning rate 0: every update assigns its own."""

    def fused_adamw(self) -> "dict[str, object] | None":
        """Return the settings of a fused AdamW kernel that makes the same steps, None if there is none."""
        return None

    def direction(self) -> "Direction":
        """Return how to find u, the direction of the last step θ − η·u; by default it is measured from the step."""
        from distgrow.optim.direction import MeasuredStep

        return MeasuredStep()


def fused(parameters: "Sequence[nn.Parameter]") -> bool:
    """Return whether torch's fused kernels can step `parameters`: they know no complex numbers.

    A fused AdamW step takes half the time of the default one, on a CPU too.
    """
    return not any(parameter.is_complex() for parameter in parameters)
