"""SGD, with momentum and L2 penalty."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from distgrow.core.errors import ConfigError
from distgrow.core.spec import PosFloat, Spec


class SGD(Spec):
    """torch.optim.SGD."""

    kind: Literal["sgd"] = "sgd"
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Momentum; 0 is plain SGD, the paper's optimizer."""
    nesterov: bool = False
    """Nesterov's momentum."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """L2 penalty."""
    clip: PosFloat | None = None
    """Largest norm of the mean gradient; none: no clipping."""

    @model_validator(mode="after")
    def _nesterov_needs_momentum(self) -> "SGD":
        if self.nesterov and self.momentum == 0:
            raise ConfigError("nesterov=true needs momentum above 0")
        return self

    @property
    def penalty(self) -> float:
        """λ of the L2 penalty (λ/2)|θ|², which is part of the objective."""
        return self.weight_decay
