"""Optimizers, one file each; a new one is a file and a member of the union `Optimizer`."""

from typing import Annotated

from pydantic import Field

from distgrow.core.spec import default_kind
from distgrow.optim.adadelta import Adadelta
from distgrow.optim.adafactor import Adafactor
from distgrow.optim.adagrad import Adagrad
from distgrow.optim.adamw import AdamW
from distgrow.optim.base import OptimizerSpec
from distgrow.optim.clars import CLARS
from distgrow.optim.lamb import LAMB
from distgrow.optim.lars import LARS
from distgrow.optim.muon import Muon
from distgrow.optim.nadam import NAdam
from distgrow.optim.own import Target
from distgrow.optim.rmsprop import RMSprop
from distgrow.optim.sgd import SGD

Optimizer = Annotated[
    SGD | AdamW | Adadelta | Adagrad | RMSprop | NAdam | Adafactor | Muon | LARS | LAMB | CLARS | Target,
    Field(discriminator="kind"),
    default_kind("sgd"),
]

__all__ = ["Optimizer", "OptimizerSpec"]
