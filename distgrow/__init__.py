"""distgrow: training whose batch size and learning rate grow by a schedule, with every gradient evaluation counted.

Names load their modules when they are first used, so that `import distgrow` loads no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distgrow.core.budget import Budget
    from distgrow.core.errors import ConfigError
    from distgrow.core.lr import LR, WSD, Cosine, StepDecay
    from distgrow.core.order import Order
    from distgrow.core.plan import Plan, split
    from distgrow.core.progress import Ledger, Outcome, Progress
    from distgrow.engine.spec import Torch
    from distgrow.growth.controller import Controller
    from distgrow.growth.short_names import (
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
    from distgrow.optim.adamw import AdamW
    from distgrow.optim.sgd import SGD
    from distgrow.tasks.task import Task
    from distgrow.training.fit import fit
    from distgrow.training.spec import RunSpec
    from distgrow.training.trainer import Result

_HOMES = {
    "core.budget": ("Budget",),
    "core.errors": ("ConfigError",),
    "core.lr": ("LR", "WSD", "Cosine", "StepDecay"),
    "core.order": ("Order",),
    "core.plan": ("Plan", "split"),
    "core.progress": ("Ledger", "Outcome", "Progress"),
    "engine.spec": ("Torch",),
    "growth.controller": ("Controller",),
    "growth.short_names": (
        "adascale", "at_temperature", "auto", "batches", "budget", "cabs", "constant", "constant_lr",
        "critical_batch_tracking", "dwell", "every", "exponential", "factor_lr", "increase", "late", "linear",
        "linear_lr", "noise_scale_tracking", "norm_threshold", "optimal", "plateau", "power_lr",
        "progress_test", "seesaw", "sqrt_lr", "tau_nice_batch",
    ),
    "optim.adamw": ("AdamW",),
    "optim.sgd": ("SGD",),
    "tasks.task": ("Task",),
    "training.fit": ("fit",),
    "training.spec": ("RunSpec",),
    "training.trainer": ("Result",),
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
