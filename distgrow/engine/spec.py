"""The settings of all engines in one union; importing this loads no torch."""

from typing import Annotated

from pydantic import Field

from distgrow.core.spec import default_kind
from distgrow.engine.asynchronous.spec import Async
from distgrow.engine.deepspeed.spec import DeepSpeed
from distgrow.engine.fsdp.spec import FSDP
from distgrow.engine.torch_spec import Torch

EngineSpec = Annotated[Torch | DeepSpeed | FSDP | Async, Field(discriminator="kind"), default_kind("torch")]


def most_rows(max_micro: int | str, epoch: int) -> int:
    """Rows of a micro-batch, at most, before memory has been asked: `auto` sets no limit but the data set's size."""
    return epoch if isinstance(max_micro, str) else max_micro
