"""Hook: what a user's code sees of a run, and what it may ask of it; calls none."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distgrow.core.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, slots=True, kw_only=True)
class HookPlace:
    """Hold where a run stands."""

    step: int  #: applied updates
    samples: int  #: samples drawn
    epoch: float  #: passes over the training set
    stage: int  #: of the batch schedule


@dataclass(frozen=True, slots=True, kw_only=True)
class RunBegun(HookPlace):
    """Hold what `begin` gets."""

    model: "nn.Module"  #: as it trains; under ZeRO 3 its parameters are in shards
    dir: Path  #: the run's folder
    tests: tuple[str, ...]  #: names of the test sets; "" for a single one
    rank: int
    world: int
    resumed: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateMade(HookPlace):
    """Hold what `after_update` gets; equal on every rank."""

    batch: int  #: samples of the update
    lr: float
    loss: float  #: mean over the batch
    grad_norm: float
    applied: bool  #: False: the gradient was not finite, and nothing moved


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationMade(HookPlace):
    """Hold what `after_eval` gets; equal on every rank."""

    metrics: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunEnded(HookPlace):
    """Hold what `end` gets."""

    reason: str  #: "done", "stopped on request", or what a hook gave
    finished: bool  #: False: the run can be resumed
    metrics: Mapping[str, float]  #: of the last evaluation; empty if there was none


@dataclass(frozen=True, slots=True)
class EndRun:
    """Ask for the end of the run: return it from `after_update` or `after_eval`."""

    reason: str


@dataclass(frozen=True, slots=True)
class KeepCheckpoint:
    """Ask for a checkpoint that is kept until another takes its name: return it from `after_eval`."""

    name: str


Wish = EndRun | KeepCheckpoint


class Hook:
    """Take part in a run: override what is needed.

    Every rank calls its own hook, so what a hook does together with other ranks must be done on all. Parameters may be
    read; whoever changes them answers for it. A hook with `state_dict()` and `load_state_dict(state)` is part of each
    checkpoint: the first rank's state is saved, and every rank gets it. It may hold tensors and plain values.
    """

    def begin(self, run: RunBegun) -> None:
        """Act before the first update of this process."""

    def after_update(self, update: UpdateMade) -> EndRun | None:
        """Act after an update. Ranks agree on the end at the next one, so that no update waits for it."""

    def after_eval(self, evaluation: EvaluationMade) -> Wish | None:
        """Act after the test sets were evaluated, before the checkpoint of this place."""

    def before_checkpoint(self, place: HookPlace) -> None:
        """Act before the state is copied for a checkpoint."""

    def end(self, run: RunEnded) -> None:
        """Act after the last checkpoint. It is not called if the run fails."""


METHODS = tuple(name for name in vars(Hook) if not name.startswith("_"))


def check_hook(key: str, value: Any) -> None:
    """Check that an object has a method of hooks, and none that looks like one and would never be called.

    Args:
        key: Where the object comes from, for the error.
        value: The object.

    Raises:
        ConfigError: It is none.
    """
    if isinstance(value, type):
        raise ConfigError(f"{key}={value.__name__} is a class: call it, {value.__name__}(…)")
    if not any(callable(getattr(value, name, None)) for name in METHODS):
        raise ConfigError(
            f"{key}={value!r}: allowed is an object with at least one of {', '.join(METHODS)}, such as a subclass of "
            "distgrow.Hook"
        )
    named = (name for each in type(value).__mro__ for name in vars(each) if name.startswith(("after_", "before_")))
    if missed := sorted(set(named) - set(METHODS)):
        raise ConfigError(
            f"{key}: {type(value).__name__}.{missed[0]} would never be called; allowed are {', '.join(METHODS)}; a "
            "method that is no hook needs another name"
        )


def check_hooks(hooks: Any) -> None:
    """Check that each is an object with methods of hooks.

    Raises:
        ConfigError: One is not.
    """
    if not isinstance(hooks, Sequence) or isinstance(hooks, str):
        raise ConfigError(f"hooks={hooks!r}: allowed is a list of hooks, [EarlyStopping(patience=3)]")
    for k, hook in enumerate(hooks):
        check_hook(f"hooks[{k}]", hook)
