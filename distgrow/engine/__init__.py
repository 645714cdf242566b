"""All that computes gradients and steps: torch, DDP and DeepSpeed, noise hooks and probes."""

from distgrow.engine.spec import DeepSpeed, Engine, EngineSpec, Torch

__all__ = ["DeepSpeed", "Engine", "EngineSpec", "Torch"]
