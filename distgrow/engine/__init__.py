"""All that computes gradients and steps, and probes; an engine's settings are a file and a member of `EngineSpec`."""

from distgrow.engine.asynchronous.spec import Async
from distgrow.engine.fsdp.spec import FSDP
from distgrow.engine.protocol import Engine
from distgrow.engine.spec import DeepSpeed, EngineSpec, Torch

__all__ = ["FSDP", "Async", "DeepSpeed", "Engine", "EngineSpec", "Torch"]
