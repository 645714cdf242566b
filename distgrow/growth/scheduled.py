"""The schedules that need no measurement, as one union."""

from typing import Annotated

from pydantic import Field

from distgrow.core.spec import reads_old_kinds
from distgrow.growth.constant import Constant
from distgrow.growth.exponential import Exponential
from distgrow.growth.linear import Linear
from distgrow.growth.steps import Steps

Plain = Annotated[Constant | Linear | Exponential | Steps, Field(discriminator="kind"), reads_old_kinds(Steps)]
