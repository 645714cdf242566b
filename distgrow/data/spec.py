"""The config of how samples are loaded."""

from typing import Annotated

from pydantic import Field

from distgrow.core.spec import Spec


class Loading(Spec):
    """How samples are loaded."""

    workers: Annotated[int, Field(ge=0, le=1024)] = 0
    """Loader processes of each rank; 0 loads in the training process."""
    prefetch: Annotated[int, Field(ge=1, le=1024)] = 4
    """Micro-batches that each loader process draws ahead; they wait in shared memory."""
