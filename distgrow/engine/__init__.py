"""All that computes gradients and steps: torch, DDP, DeepSpeed and asynchronous workers, noise hooks and probes."""

from distgrow.engine.asynchronous.spec import Async
from distgrow.engine.spec import DeepSpeed, Engine, EngineSpec, Torch

__all__ = ["Async", "DeepSpeed", "Engine", "EngineSpec", "Torch"]
