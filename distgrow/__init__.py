"""distgrow: training whose batch size and learning rate grow by a schedule, with every gradient evaluation counted.

Names load their modules when they are first used, so that `import distgrow` loads no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distgrow.controller import Controller
    from distgrow.engine import SGD, AdamW, Torch
    from distgrow.library import (
        adascale,
        at_temperature,
        auto,
        batches,
        budget,
        cabs,
        constant,
        constant_lr,
        critical_batch_tracking,
        dwell,
        every,
        exponential,
        factor_lr,
        increase,
        late,
        linear,
        linear_lr,
        noise_scale_tracking,
        norm_threshold,
        optimal,
        plateau,
        power_lr,
        progress_test,
        seesaw,
        sqrt_lr,
        tau_nice_batch,
    )
    from distgrow.lr import LR, WSD, Cosine, StepDecay
    from distgrow.order import Order
    from distgrow.plan import Plan, split
    from distgrow.progress import Ledger, Outcome, Progress
    from distgrow.run import RunSpec
    from distgrow.spec import ConfigError
    from distgrow.stages import Budget
    from distgrow.tasks import Task
    from distgrow.train import Result, fit

_HOMES = {
    "controller": ("Controller",),
    "engine": ("SGD", "AdamW", "Torch"),
    "library": (
        "adascale", "at_temperature", "auto", "batches", "budget", "cabs", "constant", "constant_lr",
        "critical_batch_tracking", "dwell", "every", "exponential", "factor_lr", "increase", "late", "linear",
        "linear_lr", "noise_scale_tracking", "norm_threshold", "optimal", "plateau", "power_lr",
        "progress_test", "seesaw", "sqrt_lr", "tau_nice_batch",
    ),
    "lr": ("LR", "WSD", "Cosine", "StepDecay"),
    "order": ("Order",),
    "plan": ("Plan", "split"),
    "progress": ("Ledger", "Outcome", "Progress"),
    "run": ("RunSpec",),
    "stages": ("Budget",),
    "spec": ("ConfigError",),
    "tasks": ("Task",),
    "train": ("Result", "fit"),
}  # fmt: skip

__all__ = [
    "LR",
    "SGD",
    "WSD",
    "AdamW",
    "Budget",
    "ConfigError",
    "Controller",
    "Cosine",
    "Ledger",
    "Order",
    "Outcome",
    "Plan",
    "Progress",
    "Result",
    "RunSpec",
    "StepDecay",
    "Task",
    "Torch",
    "adascale",
    "at_temperature",
    "auto",
    "batches",
    "budget",
    "cabs",
    "constant",
    "constant_lr",
    "critical_batch_tracking",
    "dwell",
    "every",
    "exponential",
    "factor_lr",
    "fit",
    "increase",
    "late",
    "linear",
    "linear_lr",
    "noise_scale_tracking",
    "norm_threshold",
    "optimal",
    "plateau",
    "power_lr",
    "progress_test",
    "seesaw",
    "split",
    "sqrt_lr",
    "tau_nice_batch",
]


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"distgrow.{module}"), name)
    raise AttributeError(f"module 'distgrow' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
