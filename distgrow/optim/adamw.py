"""AdamW."""

from typing import Annotated, Literal

from pydantic import Field

from distgrow.core.spec import PosFloat, Spec


class AdamW(Spec):
    """torch.optim.AdamW."""

    kind: Literal["adamw"] = "adamw"
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Decay of the first moment."""
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """Decay of the second moment."""
    eps: PosFloat = 1e-8
    """Added to the denominator."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """Decoupled weight decay."""
    clip: PosFloat | None = None
    """Largest norm of the mean gradient; none: no clipping."""

    @property
    def penalty(self) -> float:
        """Decoupled decay is no part of the objective."""
        return 0.0
