"""How samples are loaded, as a config says it."""

from typing import Annotated

from pydantic import Field

from distgrow.core.spec import PosInt, Spec


class Loading(Spec):
    """How samples are loaded."""

    workers: Annotated[int, Field(ge=0)] = 0
    """Loader processes of each rank; 0 loads in the training process."""
    prefetch: PosInt = 4
    """Micro-batches that each loader process draws ahead."""
