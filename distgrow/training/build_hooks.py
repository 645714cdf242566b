"""build_hooks(): the hooks that a config asks for, the shipped ones first."""

from collections.abc import Sequence
from typing import Any

from distgrow.core.errors import ConfigError
from distgrow.tasks.named import called
from distgrow.training.evaluation_hooks import EarlyStopping, KeepBest
from distgrow.training.hooks import check_hook
from distgrow.training.spec import RunSpec


def build_hooks(run: RunSpec, further: Sequence[Any] = ()) -> list[Any]:
    """Return the hooks of `run.keep`, `run.early_stopping` and `run.hooks`, and then `further`.

    Raises:
        ConfigError: One cannot be built, or is no hook; or several keep a best checkpoint, of which there is one.
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
    made += further
    if (count := sum(isinstance(hook, KeepBest) for hook in made)) > 1:
        raise ConfigError(
            f"{count} hooks are KeepBest (run.keep is one), but a run keeps one best checkpoint: leave one; for "
            "another one return KeepCheckpoint(name) from a hook of your own"
        )
    return made
