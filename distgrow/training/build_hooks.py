"""build_hooks(): the hooks that a config asks for, the shipped ones first."""

from typing import Any

from distgrow.tasks.named import called
from distgrow.training.evaluation_hooks import EarlyStopping, KeepBest
from distgrow.training.hooks import check_hook
from distgrow.training.spec import RunSpec


def build_hooks(run: RunSpec) -> list[Any]:
    """Return the hooks of `run.keep`, `run.early_stopping` and `run.hooks`.

    Raises:
        ConfigError: One cannot be built, or is no hook.
    """
    made: list[Any] = []
    if run.keep is not None:
        made.append(KeepBest(run.keep.best, run.keep.mode))
    if run.early_stopping is not None:
        made.append(EarlyStopping(**run.early_stopping.model_dump()))
    for k, spec in enumerate(run.hooks):
        key = f"run.hooks.{k}.target"
        hook = called(key, spec.target, spec.args)
        check_hook(key, hook)
        made.append(hook)
    return made
