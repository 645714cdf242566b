"""distgrow: training whose batch size and learning rate grow by a schedule, with every gradient evaluation counted.

Names load their modules when they are first used, so that `import distgrow` loads no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distgrow.checkpoint.export import load_weights
    from distgrow.core.average import ema, tail
    from distgrow.core.budget import Budget, budget
    from distgrow.core.errors import ConfigError
    from distgrow.core.extrapolate import Extrapolate
    from distgrow.core.lr import LR, WSD, Cosine, StepDecay, constant_lr, factor_lr, linear_lr, power_lr, sqrt_lr
    from distgrow.core.optimizer_plan import AtGrowth
    from distgrow.core.order import Order
    from distgrow.core.plan import Plan, split
    from distgrow.core.progress import Ledger, Outcome, Progress
    from distgrow.core.sampling import (
        independent_sampling,
        nice_sampling,
        partition_independent_sampling,
        partition_sampling,
        stratified_sampling,
    )
    from distgrow.core.sparsity import Sparsity, sparsity
    from distgrow.core.stages import every, min_stage
    from distgrow.core.stages import min_stage as dwell
    from distgrow.data.mixture import Mixture
    from distgrow.data.packed import Packed
    from distgrow.data.sharded import Files
    from distgrow.engine.asynchronous.spec import Async
    from distgrow.engine.fsdp.spec import FSDP
    from distgrow.engine.spec import Torch
    from distgrow.growth.adascale import adascale
    from distgrow.growth.auto import auto
    from distgrow.growth.cabs import cabs
    from distgrow.growth.certified import certified
    from distgrow.growth.constant import constant
    from distgrow.growth.controller import Controller
    from distgrow.growth.critical_batch import critical_batch_tracking
    from distgrow.growth.exponential import exponential
    from distgrow.growth.increase import increase
    from distgrow.growth.late import late
    from distgrow.growth.learned import learned
    from distgrow.growth.linear import linear
    from distgrow.growth.matched import matched
    from distgrow.growth.noise_scale import noise_scale
    from distgrow.growth.noise_scale import noise_scale as noise_scale_tracking
    from distgrow.growth.norm_threshold import norm_threshold
    from distgrow.growth.objective import objective
    from distgrow.growth.optimal import optimal
    from distgrow.growth.progress_test import progress_test
    from distgrow.growth.schedule import Schedule
    from distgrow.growth.seesaw import seesaw
    from distgrow.growth.steps import steps
    from distgrow.growth.steps import steps as batches
    from distgrow.growth.tau_adaptive import tau_adaptive
    from distgrow.growth.tau_nice import tau_nice
    from distgrow.growth.tau_nice import tau_nice as tau_nice_batch
    from distgrow.growth.temperature import plateau, temperature
    from distgrow.growth.temperature import temperature as at_temperature
    from distgrow.optim.adadelta import Adadelta
    from distgrow.optim.adafactor import Adafactor
    from distgrow.optim.adagrad import Adagrad
    from distgrow.optim.adamw import AdamW
    from distgrow.optim.clars import CLARS
    from distgrow.optim.groups import ParameterGroup, Parameters
    from distgrow.optim.lamb import LAMB
    from distgrow.optim.lars import LARS
    from distgrow.optim.muon import Muon
    from distgrow.optim.nadam import NAdam
    from distgrow.optim.own import own
    from distgrow.optim.rmsprop import RMSprop
    from distgrow.optim.sgd import SGD
    from distgrow.tasks.task import Task
    from distgrow.training.evaluation_hooks import EarlyStopping, KeepBest, LogSamples
    from distgrow.training.fit import fit
    from distgrow.training.hooks import EndRun, Hook, KeepCheckpoint
    from distgrow.training.init import init_from
    from distgrow.training.result import Result
    from distgrow.training.spec import RunSpec

#: Every public name: its module, and its name there if that is another.
_HOMES = {
    "checkpoint.export": "load_weights",
    "core.average": "ema tail",
    "core.budget": "Budget budget",
    "core.errors": "ConfigError",
    "core.extrapolate": "Extrapolate",
    "core.lr": "Cosine LR StepDecay WSD constant_lr factor_lr linear_lr power_lr sqrt_lr",
    "core.optimizer_plan": "AtGrowth",
    "core.order": "Order",
    "core.plan": "Plan split",
    "core.progress": "Ledger Outcome Progress",
    "core.sampling": "independent_sampling nice_sampling partition_independent_sampling partition_sampling "
    "stratified_sampling",
    "core.sparsity": "Sparsity sparsity",
    "core.stages": "every min_stage",
    "data.mixture": "Mixture",
    "data.packed": "Packed",
    "data.sharded": "Files",
    "engine.asynchronous.spec": "Async",
    "engine.fsdp.spec": "FSDP",
    "engine.spec": "Torch",
    "growth.adascale": "adascale",
    "growth.auto": "auto",
    "growth.cabs": "cabs",
    "growth.certified": "certified",
    "growth.constant": "constant",
    "growth.controller": "Controller",
    "growth.critical_batch": "critical_batch_tracking",
    "growth.exponential": "exponential",
    "growth.increase": "increase",
    "growth.late": "late",
    "growth.learned": "learned",
    "growth.linear": "linear",
    "growth.matched": "matched",
    "growth.noise_scale": "noise_scale",
    "growth.norm_threshold": "norm_threshold",
    "growth.objective": "objective",
    "growth.optimal": "optimal",
    "growth.progress_test": "progress_test",
    "growth.schedule": "Schedule",
    "growth.seesaw": "seesaw",
    "growth.steps": "steps",
    "growth.tau_adaptive": "tau_adaptive",
    "growth.tau_nice": "tau_nice",
    "growth.temperature": "plateau temperature",
    "optim.adadelta": "Adadelta",
    "optim.adafactor": "Adafactor",
    "optim.adagrad": "Adagrad",
    "optim.adamw": "AdamW",
    "optim.clars": "CLARS",
    "optim.lamb": "LAMB",
    "optim.lars": "LARS",
    "optim.muon": "Muon",
    "optim.nadam": "NAdam",
    "optim.rmsprop": "RMSprop",
    "optim.groups": "ParameterGroup Parameters",
    "optim.own": "own",
    "optim.sgd": "SGD",
    "tasks.task": "Task",
    "training.evaluation_hooks": "EarlyStopping KeepBest LogSamples",
    "training.fit": "fit",
    "training.hooks": "EndRun Hook KeepCheckpoint",
    "training.init": "init_from",
    "training.spec": "RunSpec",
    "training.trainer": "Result",
}

#: Names of earlier versions.
_OLD = {
    "batches": "steps",
    "noise_scale_tracking": "noise_scale",
    "at_temperature": "temperature",
    "tau_nice_batch": "tau_nice",
    "dwell": "min_stage",
}

_MODULES = {name: module for module, names in _HOMES.items() for name in names.split()}

__all__ = list(_MODULES | _OLD)  # pyright: ignore[reportUnsupportedDunderAll]  # the imports above are what it reads


def __getattr__(name: str) -> Any:
    today = _OLD.get(name, name)
    if today in _MODULES:
        return getattr(import_module(f"distgrow.{_MODULES[today]}"), today)
    raise AttributeError(f"module 'distgrow' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
