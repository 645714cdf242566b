"""Policies that grow the batch, one file each, and the Controller that turns Progress into a Plan."""

from typing import Annotated

from pydantic import Field

from distgrow.core.spec import reads_old_kinds
from distgrow.growth.adascale import AdaScale
from distgrow.growth.auto import Auto
from distgrow.growth.cabs import CABS
from distgrow.growth.certified import Certified
from distgrow.growth.constant import Constant
from distgrow.growth.critical_batch import CriticalBatch
from distgrow.growth.exponential import Exponential
from distgrow.growth.increase import Increase
from distgrow.growth.late import Late
from distgrow.growth.learned import Learned
from distgrow.growth.linear import Linear
from distgrow.growth.matched import Matched
from distgrow.growth.noise_scale import NoiseScale
from distgrow.growth.norm_threshold import NormThreshold
from distgrow.growth.optimal import Optimal
from distgrow.growth.progress_test import ProgressTest
from distgrow.growth.seesaw import Seesaw
from distgrow.growth.steps import Steps
from distgrow.growth.tau_adaptive import TauAdaptive
from distgrow.growth.tau_nice import TauNice
from distgrow.growth.temperature import Temperature

Growth = Annotated[
    Auto
    | Constant
    | Linear
    | Exponential
    | Steps
    | Optimal
    | Late
    | Matched
    | Seesaw
    | Increase
    | TauNice
    | NormThreshold
    | ProgressTest
    | CriticalBatch
    | NoiseScale
    | CABS
    | TauAdaptive
    | Temperature
    | AdaScale
    | Certified
    | Learned,
    Field(discriminator="kind"),
    reads_old_kinds(CriticalBatch, NoiseScale, NormThreshold, ProgressTest, Steps),
]
