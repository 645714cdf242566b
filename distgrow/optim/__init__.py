"""Optimizers, one file each; a new one is a file and a member of the union `Optimizer`."""

from typing import Annotated

from pydantic import Field

from distgrow.core.spec import default_kind
from distgrow.optim.adamw import AdamW
from distgrow.optim.base import OptimizerSpec
from distgrow.optim.own import Target
from distgrow.optim.sgd import SGD

Optimizer = Annotated[SGD | AdamW | Target, Field(discriminator="kind"), default_kind("sgd")]

__all__ = ["Optimizer", "OptimizerSpec"]
