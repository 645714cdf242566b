"""Optimizers, one file each, and what growth asks of them."""

from typing import Annotated

from pydantic import Field

from distgrow.core.spec import default_kind
from distgrow.optim.adamw import AdamW
from distgrow.optim.sgd import SGD

Optimizer = Annotated[SGD | AdamW, Field(discriminator="kind"), default_kind("sgd")]


def plain_sgd(optimizer: SGD | AdamW) -> bool:
    """Whether an update is θ − η·g and no more."""
    return isinstance(optimizer, SGD) and optimizer.momentum == 0
